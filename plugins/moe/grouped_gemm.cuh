// A GEMM whose rows fall into runs, each with a matrix of its own: out[row] = a[row] * b[expert of row]^T, in two forms:
// plain, and SwiGLU, whose output is silu of the product with the upper half of b times the product with its lower half.
//
// A block computes a tile of 128 rows by 128 rows of b (in SwiGLU: 64 of gate and the same 64 of up). Tiles of 128
// bytes of K stream through three stages of shared memory by cp.async. Of a row's 128 bytes, the
// eight 16-byte chunks are XOR-ed with the row's low bits: free of bank conflicts for ldmatrix, and just the 128-byte swizzle that
// wgmma reads. So sm_90a multiplies the same shared memory by wgmma, and every other chip by mma.sync.
#pragma once

#include "device.cuh"
#include "moe.h"
#include "scales.cuh"

namespace ming {

struct GemmTile {
  int32_t expert;
  int32_t begin, end;  // rows of a: at most kTileRows from `begin`, all below `end`
};

struct GemmLaunch {
  const void* a;            // [*, depth]
  const void* b;            // [experts, b_rows, depth]
  void* out;                // [rows, out_columns]
  const int32_t* gather;    // row of a = gather[row] / gather_divisor; null: the row itself
  const GemmTile* tiles;
  const int32_t* tile_count;
  int32_t gather_divisor;
  int32_t depth;
  int32_t b_rows;           // of one expert
  int32_t out_columns;
  Scales scales;
};

constexpr int32_t kTileRows = 128;
constexpr int32_t kTileColumns = 128;
constexpr int32_t kTileDepthBytes = 128;
constexpr int32_t kStages = 3;
constexpr int32_t kGemmThreads = 256;
constexpr int32_t kTileBytes = kTileRows * kTileDepthBytes;
constexpr int32_t kGemmSharedBytes = kStages * 2 * kTileBytes;
static_assert(kTileRows == kTileColumns, "both tiles of a stage are loaded by one function");

namespace detail {

// Which row of b stands in row r of the tile, relative to the tile's first output column; the up rows of SwiGLU follow
// `up_offset` rows after those of gate. Chosen so that a thread holds gate and up of the same output element.
template <bool kSwiGlu, bool kWgmma>
__device__ __forceinline__ int32_t tile_column(int32_t r, int32_t up_offset, int32_t& column) {
  if (!kSwiGlu) {
    column = r;
    return r;
  }
  if (kWgmma) {  // 64 of gate, then 64 of up
    column = r & 63;
    return column + (r < 64 ? 0 : up_offset);
  }
  column = (r >> 5) * 16 + (r & 15);  // each warp's 32: 16 of gate, then 16 of up
  return column + ((r & 16) == 0 ? 0 : up_offset);
}

__device__ __forceinline__ int32_t swizzled(int32_t row, int32_t chunk) {
  return row * kTileDepthBytes + ((chunk ^ (row & 7)) << 4);
}

template <class T>
__device__ __forceinline__ void store_pair(T* out, float first, float second) {
  struct alignas(2 * sizeof(T)) Pair {
    T value[2];
  };
  *reinterpret_cast<Pair*>(out) = Pair{{from_float<T>(first), from_float<T>(second)}};
}

}  // namespace detail

// W is the type of a and b, T that of the output. Two blocks fit a multiprocessor of sm_90; the shared memory of sm_80, 89
// and 120 holds one.
template <class T, class W, bool kSwiGlu, bool kWgmma>
__global__ void __launch_bounds__(kGemmThreads, kWgmma ? 2 : 1) grouped_gemm_kernel(const __grid_constant__ GemmLaunch p) {
  MING_DYNAMIC_SHARED(shared);
  if (static_cast<int32_t>(blockIdx.x) >= *p.tile_count) return;
  const GemmTile tile = p.tiles[blockIdx.x];
  const int32_t thread = threadIdx.x;
  const int32_t lane = thread & 31;
  const int32_t warp = thread >> 5;
  constexpr int32_t kOutColumns = kSwiGlu ? kTileColumns / 2 : kTileColumns;
  const int32_t first_column = blockIdx.y * kOutColumns;
  constexpr int32_t kChunk = 16 / sizeof(W);
  constexpr int32_t kTileDepth = kTileDepthBytes / sizeof(W);
  const W* b = static_cast<const W*>(p.b) + static_cast<int64_t>(tile.expert) * p.b_rows * p.depth;

  // Each thread copies chunk `thread % 8` of rows `thread / 8 + 32 * i` of both tiles.
  constexpr int32_t kCopies = kTileRows * 8 / kGemmThreads;
  const int32_t chunk = thread & 7;
  int32_t a_row[kCopies];  // -1: zeros
#pragma unroll
  for (int32_t i = 0; i < kCopies; ++i) {
    const int32_t r = (thread >> 3) + i * (kGemmThreads / 8);
    const int32_t row = tile.begin + r;
    a_row[i] = -1;
    if (row < tile.end) a_row[i] = p.gather != nullptr ? p.gather[row] / p.gather_divisor : row;
  }
  const W* a = static_cast<const W*>(p.a);
  const auto load_chunk = [&](unsigned char* target, const W* matrix, int32_t row, int32_t k) {
    const bool valid = row >= 0 && k < p.depth;
    device::copy_async_16(target, valid ? matrix + static_cast<int64_t>(row) * p.depth + k : matrix, valid);
  };
  const auto load_stage = [&](int32_t stage, int32_t k) {
    unsigned char* a_tile = shared + stage * 2 * kTileBytes;
#pragma unroll
    for (int32_t i = 0; i < kCopies; ++i) {
      const int32_t r = (thread >> 3) + i * (kGemmThreads / 8);
      const int32_t target = detail::swizzled(r, chunk);
      int32_t column;
      int32_t b_row = first_column + detail::tile_column<kSwiGlu, kWgmma>(r, p.out_columns, column);
      if (first_column + column >= p.out_columns) b_row = -1;
      load_chunk(a_tile + target, a, a_row[i], k + chunk * kChunk);
      load_chunk(a_tile + kTileBytes + target, b, b_row, k + chunk * kChunk);
    }
  };

  float sum[64] = {};  // both forms: 64 accumulators per thread
  const int32_t steps = (p.depth + kTileDepth - 1) / kTileDepth;
#pragma unroll
  for (int32_t s = 0; s < kStages - 1; ++s) {
    if (s < steps) load_stage(s, s * kTileDepth);
    device::copy_async_commit();
  }
  for (int32_t step = 0; step < steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    if (kWgmma) device::fence_shared_for_wgmma();
    __syncthreads();  // stage `step` has arrived, and all are done with the stage that is filled next
    const int32_t ahead = step + kStages - 1;
    if (ahead < steps) load_stage(ahead % kStages, ahead * kTileDepth);
    device::copy_async_commit();

    unsigned char* a_tile = shared + step % kStages * 2 * kTileBytes;
    unsigned char* b_tile = a_tile + kTileBytes;
    if constexpr (kWgmma) {
      const int32_t half = warp >> 2;  // a warpgroup multiplies 64 rows by all 128 columns
      if (tile.begin + half * 64 < tile.end) {
        device::wgmma_begin();
        const uint32_t a_address = device::shared_address(a_tile + half * 64 * kTileDepthBytes);
        const uint32_t b_address = device::shared_address(b_tile);
#pragma unroll
        for (int32_t k = 0; k < kTileDepthBytes / 32; ++k) {
          device::wgmma_step<W>(sum, device::wgmma_descriptor(a_address + k * 32),
                                device::wgmma_descriptor(b_address + k * 32));
        }
        device::wgmma_commit();
        device::wgmma_wait();
      }
    } else {
      const int32_t row0 = (warp >> 2) * 64;  // a warp multiplies 64 rows by 32 columns
      const int32_t column0 = (warp & 3) * 32;
      // FP8 products may be taken apart (see decode.cuh): unrolled, they spill.
      [[maybe_unused]] constexpr int32_t kUnroll = sizeof(W) == 1 ? 1 : kTileDepthBytes / 32;
#pragma unroll kUnroll
      for (int32_t k = 0; k < kTileDepthBytes / 32; ++k) {
        uint32_t b_part[2][4];
#pragma unroll
        for (int32_t n = 0; n < 2; ++n) {  // matrices: columns 0-7 low k, high k, columns 8-15 low k, high k
          const int32_t r = column0 + n * 16 + (lane >> 4) * 8 + (lane & 7);
          device::load_matrix_x4(b_part[n], b_tile + detail::swizzled(r, k * 2 + (lane >> 3 & 1)));
        }
#pragma unroll
        for (int32_t m = 0; m < 4; ++m) {
          uint32_t a_part[4];  // matrices: rows 0-7 low k, rows 8-15 low k, rows 0-7 high k, rows 8-15 high k
          const int32_t r = row0 + m * 16 + (lane & 15);
          device::load_matrix_x4(a_part, a_tile + detail::swizzled(r, k * 2 + (lane >> 4)));
#pragma unroll
          for (int32_t n = 0; n < 4; ++n) {
            float(&part)[4] = *reinterpret_cast<float(*)[4]>(&sum[(m * 4 + n) * 4]);
            device::mma_step<W>(part, a_part, b_part[n >> 1][(n & 1) * 2], b_part[n >> 1][(n & 1) * 2 + 1]);
          }
        }
      }
    }
  }

  // Register (n, i) holds row i / 2 * 8 + lane / 4 and column 8 n + 2 (lane % 4) + i % 2 of a block of accumulators.
  const int32_t inner_row = lane >> 2;
  const int32_t inner_column = (lane & 3) * 2;
  const int64_t b_first = static_cast<int64_t>(tile.expert) * p.b_rows;
  const auto store = [&](int32_t row, int32_t column, float first, float second) {
    if (row >= tile.end || column >= p.out_columns) return;
    first *= p.scales.down<W>(b_first + column);
    second *= p.scales.down<W>(b_first + column + 1);
    detail::store_pair(static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.out_columns + column, first, second);
  };
  const auto store_swiglu = [&](int32_t row, int32_t column, const float* gate, const float* up) {
    if (row >= tile.end || column >= p.out_columns) return;
    float inner[2];
#pragma unroll
    for (int32_t e = 0; e < 2; ++e) {
      const int64_t at = b_first + column + e;
      inner[e] = silu(gate[e] * p.scales.gate_up<W>(at)) * (up[e] * p.scales.gate_up<W>(at + p.out_columns)) *
                 p.scales.to_inner<W>();
    }
    detail::store_pair(static_cast<W*>(p.out) + static_cast<int64_t>(row) * p.out_columns + column, inner[0], inner[1]);
  };
  if constexpr (kWgmma) {
    const int32_t row = tile.begin + warp * 16 + inner_row;
#pragma unroll
    for (int32_t n = 0; n < (kSwiGlu ? 8 : 16); ++n) {
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t at = n * 4 + i * 2;
        const int32_t column = first_column + n * 8 + inner_column;
        if (kSwiGlu) {
          store_swiglu(row + i * 8, column, &sum[at], &sum[32 + at]);
        } else {
          store(row + i * 8, column, sum[at], sum[at + 1]);
        }
      }
    }
  } else {
#pragma unroll
    for (int32_t m = 0; m < 4; ++m) {
      const int32_t row = tile.begin + (warp >> 2) * 64 + m * 16 + inner_row;
#pragma unroll
      for (int32_t n = 0; n < (kSwiGlu ? 2 : 4); ++n) {
#pragma unroll
        for (int32_t i = 0; i < 2; ++i) {
          const int32_t at = (m * 4 + n) * 4 + i * 2;
          const int32_t column = first_column + (warp & 3) * (kOutColumns / 4) + n * 8 + inner_column;
          if (kSwiGlu) {
            store_swiglu(row + i * 8, column, &sum[at], &sum[8 + at]);
          } else {
            store(row + i * 8, column, sum[at], sum[at + 1]);
          }
        }
      }
    }
  }
}

// `most_tiles` is an upper bound of *tile_count, known without reading the device.
template <class T, class W, bool kSwiGlu, bool kWgmma>
int32_t launch_gemm(const GemmLaunch& launch, int32_t most_tiles, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<T, W, kSwiGlu, kWgmma>;
  const auto status = static_cast<int32_t>(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kGemmSharedBytes));
  if (status != 0) return status;
  constexpr int32_t kOutColumns = kSwiGlu ? kTileColumns / 2 : kTileColumns;
  const dim3 grid(static_cast<unsigned>(most_tiles),
                  static_cast<unsigned>((launch.out_columns + kOutColumns - 1) / kOutColumns));
  MING_LAUNCH(kernel, grid, dim3(kGemmThreads), kGemmSharedBytes, stream, launch);
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace ming
