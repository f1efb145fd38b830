// msl/math.h and msl/simdgroup.h already overload everything for bfloat; MLX's file calls Apple's
// internals.
#pragma once
