// MLX's file needs <metal_logging>, which this emulator does not have.
#pragma once

namespace mlx {
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... Args>
  void log_debug(const char*, Args...) const {}
};
}  // namespace mlx
