// From one description of a call to its kernels: limits, the layout of the workspace, decode or prefill.
#pragma once

#include "decode.cuh"
#include "prefill.cuh"
#include "status.h"

namespace ming {

struct MoeWorkspace {
  int64_t expert, weight, inner;                             // both paths
  int64_t x;                                                 // FP8: x rounded
  int64_t plan;                                              // decode
  int64_t row_slot, slot_row, tiles, tile_count, expert_out;  // prefill
  int64_t bytes;
};

// More tokens than this would overflow 32-bit row numbers.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

inline int32_t check_moe(int64_t tokens, int32_t hidden, int32_t width, int32_t experts, int32_t top_k, bool fp8) {
  const int32_t multiple = row_multiple(fp8);
  const bool ok = tokens >= 0 && tokens <= kMaxTokens && hidden >= multiple && hidden % multiple == 0 &&
                  width >= multiple && width % multiple == 0 && experts >= 1 && experts <= kMaxExperts && top_k >= 1 &&
                  top_k <= kMaxTopK && top_k <= experts;
  return ok ? kOk : kBadShape;
}

inline int32_t most_gemm_tiles(int64_t slots, int32_t experts) {
  return static_cast<int32_t>(slots / kTileRows + (slots < experts ? slots : experts));
}

// Offsets of the parts, for up to `tokens` tokens on any path, with FP8 or without.
inline MoeWorkspace moe_workspace(int64_t tokens, int32_t hidden, int32_t width, int32_t experts, int32_t top_k) {
  MoeWorkspace w{};
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at += (bytes + 255) / 256 * 256;
    return begin;
  };
  const int64_t slots = tokens * top_k;
  w.expert = take(slots * 4);
  w.weight = take(slots * 4);
  w.inner = take(slots * width * 2);
  w.x = take(tokens * hidden);
  w.plan = take(sizeof(DecodePlan));
  w.row_slot = take(slots * 4);
  w.slot_row = take(slots * 4);
  w.tiles = take(int64_t{most_gemm_tiles(slots, experts)} * sizeof(GemmTile));
  w.tile_count = take(4);
  w.expert_out = take(slots * hidden * 2);
  w.bytes = at;
  return w;
}

namespace detail {

template <class T, class W, bool kWgmma>
int32_t launch_prefill(const MoeCall& c, const void* x, const Scales& scales, const MoeWorkspace& w, cudaStream_t stream) {
  auto* base = static_cast<unsigned char*>(c.workspace);
  const auto slots = static_cast<int32_t>(c.tokens * c.top_k);
  const auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
  auto* tiles = reinterpret_cast<GemmTile*>(base + w.tiles);
  const SortLaunch sort{ints(w.expert), ints(w.row_slot), ints(w.slot_row), tiles, ints(w.tile_count),
                        slots,          c.experts};
  MING_LAUNCH(sort_kernel, dim3(static_cast<unsigned>(c.experts)), dim3(kSortThreads), 0, stream, sort);
  auto status = static_cast<int32_t>(cudaGetLastError());
  if (status != 0) return status;
  const int32_t most = most_gemm_tiles(slots, c.experts);
  const GemmLaunch up{x,     c.gate_up, base + w.inner, ints(w.row_slot), tiles, ints(w.tile_count),
                      c.top_k, c.hidden,  2 * c.width,    c.width, scales};
  status = launch_gemm<T, W, true, kWgmma>(up, most, stream);
  if (status != 0) return status;
  const GemmLaunch down{base + w.inner, c.down,  base + w.expert_out, nullptr, tiles, ints(w.tile_count),
                        1,              c.width, c.hidden,            c.hidden, scales};
  status = launch_gemm<T, W, false, kWgmma>(down, most, stream);
  if (status != 0) return status;
  const CombineLaunch combine{base + w.expert_out,
                              ints(w.slot_row),
                              reinterpret_cast<const float*>(base + w.weight),
                              c.addend,
                              c.y,
                              c.tokens,
                              c.hidden,
                              c.top_k};
  const int64_t vectors = c.tokens * (c.hidden / 8);
  MING_LAUNCH(combine_kernel<T>, dim3(static_cast<unsigned>((vectors + kCombineThreads - 1) / kCombineThreads)),
              dim3(kCombineThreads), 0, stream, combine);
  return static_cast<int32_t>(cudaGetLastError());
}

// Compute capability of the current device, as 90 for 9.0.
inline int32_t capability(int32_t* out) {
  int device = 0;
  int major = 0;
  int minor = 0;
  auto error = static_cast<int32_t>(cudaGetDevice(&device));
  if (error == 0) error = static_cast<int32_t>(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (error == 0) error = static_cast<int32_t>(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  *out = 10 * major + minor;
  return error;
}

template <class T, class W>
int32_t launch_moe(const MoeCall& c, cudaStream_t stream) {
  const MoeWorkspace w = moe_workspace(c.tokens, c.hidden, c.width, c.experts, c.top_k);
  if (c.workspace_bytes < w.bytes) return kWorkspaceTooSmall;
  auto* base = static_cast<unsigned char*>(c.workspace);
  const bool decode = c.path == kDecode || (c.path == kAutomatic && c.tokens <= kMaxDecodeTokens);
  if (decode && c.tokens > kMaxDecodeTokens) return kBadShape;
  int32_t chip = 0;
  int32_t status = capability(&chip);
  if (status != 0) return status;
  if (c.fp8 && chip < 89) return kNoFp8;
  auto* plan = decode ? reinterpret_cast<DecodePlan*>(base + w.plan) : nullptr;
  const RouteLaunch route{c.logits,
                          c.modality,
                          reinterpret_cast<int32_t*>(base + w.expert),
                          reinterpret_cast<float*>(base + w.weight),
                          plan,
                          c.tokens,
                          c.experts,
                          c.top_k,
                          c.routers,
                          c.normalize,
                          c.modality_bytes};
  status = launch_route<T>(route, stream);
  if (status != 0) return status;
  const void* x = c.x;
  Scales scales{};
  if (c.fp8) {
    scales = Scales{c.x_scale, c.inner_scale, c.gate_up_scale, c.down_scale};
    x = base + w.x;
    const RoundLaunch round{c.x, reinterpret_cast<fp8_t*>(base + w.x), c.tokens * c.hidden, 1.0f / c.x_scale};
    status = launch_round<T>(round, stream);
    if (status != 0) return status;
  }
  if (decode) {
    const DecodeLaunch launch{x,  c.gate_up, c.down, c.addend, base + w.inner, c.y, plan, static_cast<int32_t>(c.tokens),
                              c.hidden, c.width, c.top_k, scales};
    return launch_decode<T, W>(launch, c.experts, stream);
  }
  const bool wgmma = c.path != kPrefillPortable && chip == 90;
  return wgmma ? launch_prefill<T, W, true>(c, x, scales, w, stream)
               : launch_prefill<T, W, false>(c, x, scales, w, stream);
}

}  // namespace detail

// Enqueues the layer. Nothing is allocated and nothing waits, so it can be captured in a graph. Returns a status.
inline int32_t moe_forward(const MoeCall& c, cudaStream_t stream) {
  const int32_t status = check_moe(c.tokens, c.hidden, c.width, c.experts, c.top_k, c.fp8 != 0);
  if (status != kOk) return status;
  if (c.routers != 1 && c.routers != 3) return kBadShape;
  if (c.fp8 && !(c.gate_up_scale != nullptr && c.down_scale != nullptr && c.x_scale > 0 && c.inner_scale > 0)) {
    return kBadShape;
  }
  if (c.routers == 3 && (c.modality == nullptr || (c.modality_bytes != 4 && c.modality_bytes != 8))) return kBadShape;
  if (c.path < kAutomatic || c.path > kPrefillPortable) return kBadShape;
  for (const void* pointer : {c.x, c.gate_up, c.down, c.addend, const_cast<const void*>(c.y),
                              const_cast<const void*>(c.workspace)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return kBadAlignment;
  }
  if (c.tokens == 0) return kOk;
  switch (c.dtype) {
#if !defined(MING_ONLY_BFLOAT16)  // shortens the compilation of a test
    case kFloat16:
      return c.fp8 ? detail::launch_moe<half_t, fp8_t>(c, stream) : detail::launch_moe<half_t, half_t>(c, stream);
#endif
    case kBFloat16:
      return c.fp8 ? detail::launch_moe<bfloat_t, fp8_t>(c, stream) : detail::launch_moe<bfloat_t, bfloat_t>(c, stream);
    default:
      return kBadDtype;
  }
}

}  // namespace ming
