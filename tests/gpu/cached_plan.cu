// A plan of the runtime's tests: what a decode step does with a cache, in three kernels. See test_runtime.py.
#include <cstdint>
#include <cuda_runtime.h>

// cache [rows, capacity, width] gets `tokens` new rows each, from index[row] on, in place
__global__ void write_rows(float *cache, const float *fresh, const int64_t *index, int64_t capacity, int64_t tokens,
                           int64_t width, int64_t count) {
    int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i >= count)
        return;
    int64_t row = i / (tokens * width), inside = i % (tokens * width);
    cache[(row * capacity + index[row]) * width + inside] = fresh[i];
}

// One block: content = sum of the cache, exact for the small integers that the tests use. scratch [blockDim.x]
__global__ void sum_cache(const float *cache, int64_t count, float *scratch) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
        sum += cache[i];
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < blockDim.x; ++i)
            sum += scratch[i];
        scratch[0] = sum;
    }
}

__global__ void results(const float *x, const float *scratch, float *y, float *square, int64_t count) {
    int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (i >= count)
        return;
    y[i] = x[i] + scratch[0];
    square[i] = x[i] * x[i];
}

extern "C" int cached_plan(const float *x, float *cache, const float *fresh, const int64_t *index, float *y,
                           float *square, float *scratch, int64_t count, int64_t rows, int64_t capacity,
                           int64_t tokens, int64_t width, void *stream) {
    cudaStream_t queue = static_cast<cudaStream_t>(stream);
    int64_t fresh_count = rows * tokens * width;
    write_rows<<<(fresh_count + 255) / 256, 256, 0, queue>>>(cache, fresh, index, capacity, tokens, width, fresh_count);
    sum_cache<<<1, 256, 0, queue>>>(cache, rows * capacity * width, scratch);
    results<<<(count + 255) / 256, 256, 0, queue>>>(x, scratch, y, square, count);
    return int(cudaGetLastError());
}
