"""Correct kernels for the emulator's own tests."""

SUM = """
    threadgroup float partial[32];
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const uint n = threads_per_threadgroup.x;
    float total = 0;
    for (uint i = thread_index_in_threadgroup; i < uint(x_shape[0]); i += n) total += x[i];
    total = simd_sum(total);
    if (lane == 0) partial[sg] = total;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    total = simd_sum(lane < simdgroups_per_threadgroup ? partial[lane] : 0.0f);
    if (thread_index_in_threadgroup == 0) out[0] = total;
"""

SOFTMAX = """
    const uint row = threadgroup_position_in_grid.y, lane = thread_index_in_simdgroup;
    const device half4* from = (const device half4*)(x + row * N);
    float4 values[N / 128];
    float top = -INFINITY;
    for (int i = 0; i < N / 128; i++) {
        values[i] = float4(from[i * 32 + lane]);
        top = max(top, max(max(values[i].x, values[i].y), max(values[i].z, values[i].w)));
    }
    top = simd_max(top);
    float total = 0;
    for (int i = 0; i < N / 128; i++) {
        values[i] = fast::exp(values[i] - top);
        total += dot(values[i], float4(1));
    }
    total = simd_sum(total);
    for (int i = 0; i < N / 128; i++)
        ((device half4*)(out + row * N))[i * 32 + lane] = half4(values[i] / total);
"""

# out[M, N] = a[M, K] b[K, N]: 32 x 16 per threadgroup of 4 simdgroups, a staged 32 x 8.
GEMM = """
    threadgroup T tile[32][8];
    const uint sg = simdgroup_index_in_threadgroup, thread_index = thread_index_in_threadgroup;
    const uint3 at = threadgroup_position_in_grid;
    const device T* rows = a + at.y * 32 * K;
    simdgroup_matrix<T, 8, 8> left, right;
    simdgroup_float8x8 total[2];
    for (int j = 0; j < 2; j++) total[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
        for (uint e = thread_index; e < 256; e += 128)
            tile[e / 8][e % 8] = rows[e / 8 * K + k + e % 8];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(left, &tile[sg * 8][0], 8);
        for (int j = 0; j < 2; j++) {
            simdgroup_load(right, b + k * N + at.x * 16 + j * 8, N);
            simdgroup_multiply_accumulate(total[j], left, right, total[j]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int j = 0; j < 2; j++) {
        simdgroup_matrix<T, 8, 8> rounded;
        for (int i = 0; i < 2; i++)
            rounded.thread_elements()[i] = T(total[j].thread_elements()[i]);
        simdgroup_store(rounded, out + (at.y * 32 + sg * 8) * N + at.x * 16 + j * 8, N);
    }
"""

# One query row per threadgroup. Simdgroup g takes keys g, g + 4, ...; a lane holds D / 32 columns.
ATTENTION = """
    constexpr int E = D / 32;
    threadgroup float tops[4], totals[4], parts[4][D];
    const uint h = threadgroup_position_in_grid.y, lane = thread_index_in_simdgroup;
    const uint sg = simdgroup_index_in_threadgroup;
    const int L = k_shape[1];
    const device T* keys = k + (h / GQA) * L * D + lane * E;
    const device T* values = v + (h / GQA) * L * D + lane * E;
    float query[E], sum[E], top = -INFINITY, total = 0;
    for (int i = 0; i < E; i++) {
        query[i] = float(q[h * D + lane * E + i]) * scale;
        sum[i] = 0;
    }
    for (int t = sg; t < L; t += 4) {
        float score = 0;
        for (int i = 0; i < E; i++) score = fma(query[i], float(keys[t * D + i]), score);
        score = simd_sum(score);
        const float higher = max(top, score), fade = fast::exp(top - higher);
        const float weight = fast::exp(score - higher);
        top = higher;
        total = total * fade + weight;
        for (int i = 0; i < E; i++) sum[i] = sum[i] * fade + weight * float(values[t * D + i]);
    }
    if (lane == 0) {
        tops[sg] = top;
        totals[sg] = total;
    }
    for (int i = 0; i < E; i++) parts[sg][lane * E + i] = sum[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float highest = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
    float all = 0, result = 0;
    const uint d = thread_index_in_threadgroup;
    for (int s = 0; s < 4; s++) {
        const float fade = fast::exp(tops[s] - highest);
        all += totals[s] * fade;
        if (d < D) result += parts[s][d] * fade;
    }
    if (d < D) out[h * D + d] = T(result / all);
"""
