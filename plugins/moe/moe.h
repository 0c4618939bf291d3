// Sparse mixture of experts: limits, the description of a call, and the maths that kernels and host reference share.
//
// Meaning: `ming::sparse_moe` in ming_trt/models/ops.py, plus two things that a caller may leave out: choosing a router's
// logits by modality, and adding a tensor (the shared expert) to the rounded result.
#pragma once

#include "numeric.h"

namespace ming {

constexpr int32_t kMaxExperts = 256;
constexpr int32_t kMaxTopK = 16;
constexpr int32_t kMaxDecodeTokens = 16;  // up to here the decode kernels run
// Rows of weights start at multiples of 16 bytes, so hidden and width are multiples of this.
constexpr int32_t row_multiple(bool fp8) { return fp8 ? 16 : 8; }

enum MoePath : int32_t { kAutomatic = 0, kDecode = 1, kPrefill = 2, kPrefillPortable = 3 };

// One call. `dtype` is that of all floating tensors. x, addend, y [tokens, hidden]; logits [tokens, routers * experts];
// modality [tokens] (null if routers is 1); gate_up [experts, 2 * width, hidden] (rows of gate, then of up);
// down [experts, hidden, width]; addend may be null.
//
// With `fp8`, gate_up and down hold e4m3 numbers w with gate_up_scale float32 [experts, 2 * width] and down_scale float32
// [experts, hidden], one per output: the weight is w * scale. x and the inner activation are rounded to e4m3 too, in units
// of x_scale and inner_scale. Products are summed in float32 and scaled then.
struct MoeCall {
  const void* x;
  const void* logits;
  const void* modality;
  const void* gate_up;
  const void* down;
  const void* addend;
  void* y;
  void* workspace;
  int64_t workspace_bytes;
  int64_t tokens;
  int32_t hidden, width, experts, top_k, routers, normalize;
  int32_t modality_bytes;
  int32_t dtype;
  int32_t path;  // MoePath
  int32_t fp8;
  float x_scale, inner_scale;
  const float* gate_up_scale;
  const float* down_scale;
};

// The router of a modality code, as the reference chooses it: 2 audio, 1 image, anything else text.
MING_HD int32_t router_of(int64_t modality) { return modality == 2 ? 2 : modality == 1 ? 1 : 0; }

// Larger first; among equals the lower expert. NaN counts as largest, so that it reaches the output and is seen.
MING_HD float route_key(float probability) { return probability == probability ? probability : 3.0e38f; }
MING_HD bool routes_before(float key_a, int32_t expert_a, float key_b, int32_t expert_b) {
  return key_a > key_b || (key_a == key_b && expert_a < expert_b);
}

MING_HD float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace ming
