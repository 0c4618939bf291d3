// From one description of a call to its kernels: limits, the layout of the workspace, decode or prefill.
#pragma once

#include "decode.cuh"
#include "prefill.cuh"
#include "status.h"

namespace ming {

struct MoeWorkspace {
  int64_t expert, weight, inner;                             // both paths
  int64_t plan;                                              // decode
  int64_t row_slot, slot_row, tiles, tile_count, expert_out;  // prefill
  int64_t bytes;
};

// More tokens than this would overflow 32-bit row numbers.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

inline int32_t check_moe(int64_t tokens, int32_t hidden, int32_t width, int32_t experts, int32_t top_k, int32_t routers) {
  const bool ok = tokens >= 0 && tokens <= kMaxTokens && hidden >= kRowMultiple && hidden % kRowMultiple == 0 &&
                  width >= kRowMultiple && width % kRowMultiple == 0 && experts >= 1 && experts <= kMaxExperts &&
                  top_k >= 1 && top_k <= kMaxTopK && top_k <= experts && (routers == 1 || routers == 3);
  return ok ? kOk : kBadShape;
}

inline int32_t most_gemm_tiles(int64_t slots, int32_t experts) {
  return static_cast<int32_t>(slots / kTileRows + (slots < experts ? slots : experts));
}

// Offsets of the parts, for up to `tokens` tokens on any path.
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

template <class T, bool kWgmma>
int32_t launch_prefill(const MoeCall& c, const MoeWorkspace& w, cudaStream_t stream) {
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
  const GemmLaunch up{c.x,     c.gate_up, base + w.inner, ints(w.row_slot), tiles, ints(w.tile_count),
                      c.top_k, c.hidden,  2 * c.width,    c.width};
  status = launch_gemm<T, true, kWgmma>(up, most, stream);
  if (status != 0) return status;
  const GemmLaunch down{base + w.inner, c.down,  base + w.expert_out, nullptr, tiles, ints(w.tile_count),
                        1,              c.width, c.hidden,            c.hidden};
  status = launch_gemm<T, false, kWgmma>(down, most, stream);
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

template <class T>
int32_t launch_moe(const MoeCall& c, cudaStream_t stream) {
  const MoeWorkspace w = moe_workspace(c.tokens, c.hidden, c.width, c.experts, c.top_k);
  if (c.workspace_bytes < w.bytes) return kWorkspaceTooSmall;
  auto* base = static_cast<unsigned char*>(c.workspace);
  const bool decode = c.path == kDecode || (c.path == kAutomatic && c.tokens <= kMaxDecodeTokens);
  if (decode && c.tokens > kMaxDecodeTokens) return kBadShape;
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
  const int32_t status = launch_route<T>(route, stream);
  if (status != 0) return status;
  if (decode) {
    const DecodeLaunch launch{c.x,  c.gate_up, c.down, c.addend, base + w.inner, c.y, plan, static_cast<int32_t>(c.tokens),
                              c.hidden, c.width, c.top_k};
    return launch_decode<T>(launch, c.experts, stream);
  }
  int device = 0;
  int major = 0;
  int minor = 0;
  auto error = static_cast<int32_t>(cudaGetDevice(&device));
  if (error == 0) error = static_cast<int32_t>(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (error == 0) error = static_cast<int32_t>(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (error != 0) return error;
  const bool wgmma = c.path != kPrefillPortable && major == 9 && minor == 0;
  return wgmma ? launch_prefill<T, true>(c, w, stream) : launch_prefill<T, false>(c, w, stream);
}

}  // namespace detail

// Enqueues the layer. Nothing is allocated and nothing waits, so it can be captured in a graph. Returns a status.
inline int32_t moe_forward(const MoeCall& c, cudaStream_t stream) {
  const int32_t status = check_moe(c.tokens, c.hidden, c.width, c.experts, c.top_k, c.routers);
  if (status != kOk) return status;
  if (c.routers == 3 && (c.modality == nullptr || (c.modality_bytes != 4 && c.modality_bytes != 8))) return kBadShape;
  if (c.path < kAutomatic || c.path > kPrefillPortable) return kBadShape;
  for (const void* pointer : {c.x, c.gate_up, c.down, c.addend, const_cast<const void*>(c.y),
                              const_cast<const void*>(c.workspace)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return kBadAlignment;
  }
  if (c.tokens == 0) return kOk;
  switch (c.dtype) {
    case kFloat16:
      return detail::launch_moe<half_t>(c, stream);
    case kBFloat16:
      return detail::launch_moe<bfloat_t>(c, stream);
    default:
      return kBadDtype;
  }
}

}  // namespace ming
