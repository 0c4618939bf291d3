// The device instructions that the kernels use, each behind one function.
//
// With MING_EMULATION defined, a host compiler takes them from tests/plugins/cuda_emulation.h instead, which runs a
// kernel's threads as fibers. So the same kernel source runs on a machine without a GPU.
#pragma once

#include "numeric.h"

#if defined(MING_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>

#define MING_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define MING_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

namespace ming::device {

constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}
__device__ __forceinline__ int shuffle_xor(int value, int mask) { return __shfl_xor_sync(kWholeWarp, value, mask); }
__device__ __forceinline__ unsigned ballot(bool predicate) { return __ballot_sync(kWholeWarp, predicate); }

// 16 bytes that are read once: kept out of L1.
__device__ __forceinline__ uint4 load_streaming(const void* source) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

// d += a (16 rows) * b (8 columns) over 32 bytes of K: 16 elements of 16 bits (m16n8k16) or 32 of FP8 (m16n8k32). In both
// a lane's fragments are the same bytes of a row, so the kernels count K in bytes.
template <class T>
__device__ __forceinline__ void mma_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define MING_MMA(shape, kind)                                                                                      \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." kind "." kind                                              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <>
__device__ __forceinline__ void mma_step<bfloat_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MING_MMA("m16n8k16", "bf16");
}
template <>
__device__ __forceinline__ void mma_step<half_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MING_MMA("m16n8k16", "f16");
}
template <>
__device__ __forceinline__ void mma_step<fp8_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  MING_MMA("m16n8k32", "e4m3");
#else
  __trap();  // refused before the launch
#endif
}
#undef MING_MMA

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copies 16 bytes to shared memory without registers, or writes zeros there if not `valid` (`source` is not read then).
__device__ __forceinline__ void copy_async_16(void* target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
// sm_90a only. What this thread wrote to shared memory becomes visible to wgmma of any warp after the next barrier.
__device__ __forceinline__ void fence_shared_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define MING_WGMMA(shape, kind, tail)                                                                                  \
  asm volatile(                                                                                                     \
      "wgmma.mma_async.sync.aligned." shape ".f32." kind "." kind                                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
      "%64, %65, 1, 1, 1" tail ";"                                                                                    \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),             \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),       \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),     \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),     \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),     \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),     \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),     \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])      \
      : "l"(a), "l"(b))

// d += a (64 rows) * b (128 columns) over 32 bytes of K, for the 128 threads of a warpgroup; a and b are descriptors of
// shared memory in which 128 bytes of a row's K stand together, with the 128-byte swizzle.
template <class T>
__device__ __forceinline__ void wgmma_step(float (&d)[64], uint64_t a, uint64_t b);
template <>
__device__ __forceinline__ void wgmma_step<bfloat_t>(float (&d)[64], uint64_t a, uint64_t b) {
  MING_WGMMA("m64n128k16", "bf16", ", 0, 0");
}
template <>
__device__ __forceinline__ void wgmma_step<half_t>(float (&d)[64], uint64_t a, uint64_t b) {
  MING_WGMMA("m64n128k16", "f16", ", 0, 0");
}
template <>
__device__ __forceinline__ void wgmma_step<fp8_t>(float (&d)[64], uint64_t a, uint64_t b) {
  MING_WGMMA("m64n128k32", "e4m3", "");
}
#undef MING_WGMMA
#else  // launched for no other chip
__device__ __forceinline__ void fence_shared_for_wgmma() {}
__device__ __forceinline__ void wgmma_begin() {}
__device__ __forceinline__ void wgmma_commit() {}
__device__ __forceinline__ void wgmma_wait() {}
template <class T>
__device__ __forceinline__ void wgmma_step(float (&)[64], uint64_t, uint64_t) {
  __trap();
}
#endif

}  // namespace ming::device
#endif

namespace ming::device {

// Matrix descriptor for wgmma: start address, 1024 bytes between groups of 8 rows, 128-byte swizzle. The tile starts at
// a multiple of 1024 bytes; a step along K is 32 bytes.
MING_HD uint64_t wgmma_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

}  // namespace ming::device
