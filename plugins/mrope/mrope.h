// Three-axis rotary embedding: the maths, shared by the kernels, the host reference and the TensorRT plugin.
//
// Meaning: `ming::mrope` in ming_trt/models/ops.py. Frequency j of head_dim / 2 turns elements j and j + head_dim / 2 of
// a head by position[axis[j]] * theta^(-2j / head_dim), in float32.
#pragma once

#include "numeric.h"

namespace ming {

constexpr int32_t kMaxFrequencies = 128;  // heads of up to 256 elements

struct Frequencies {
  float inverse[kMaxFrequencies];
  uint8_t axis[kMaxFrequencies];
  int32_t count;
};

// `axes[j]` is 0 time, 1 height, 2 width. False if a count or an axis is out of range.
inline bool make_frequencies(const int32_t* axes, int32_t count, float theta, Frequencies* out) {
  if (count < 1 || count > kMaxFrequencies || !(theta > 0)) return false;
  *out = Frequencies{};
  out->count = count;
  for (int32_t j = 0; j < count; ++j) {
    if (axes[j] < 0 || axes[j] > 2) return false;
    // Float32 in this order, as in the reference: one ulp here is a thousandth of a turn at position 32768.
    out->inverse[j] = 1.0f / std::pow(theta, static_cast<float>(2 * j) / static_cast<float>(2 * count));
    out->axis[j] = static_cast<uint8_t>(axes[j]);
  }
  return true;
}

MING_HD float rope_angle(const Frequencies& f, int32_t j, const int64_t (&position)[3]) {
  const int64_t p = f.axis[j] == 0 ? position[0] : f.axis[j] == 1 ? position[1] : position[2];
  return static_cast<float>(p) * f.inverse[j];
}

MING_HD void rotate_pair(float& low, float& high, float cosine, float sine) {
  const float turned = low * cosine - high * sine;
  high = high * cosine + low * sine;
  low = turned;
}

// Position of place `place` of a sequence: given for the prompt, place + delta on every axis after it.
// `positions` [3, length].
MING_HD void table_position(const void* positions, int32_t index_bytes, int64_t length, int64_t delta, int64_t place,
                            int64_t (&out)[3]) {
  for (int32_t axis = 0; axis < 3; ++axis) {
    out[axis] = place < length ? read_index(positions, index_bytes, axis * length + place) : place + delta;
  }
}

// Heads of a tensor [batch, heads, tokens, head_dim] whose last dimension is dense; strides in elements.
struct HeadView {
  const void* data;
  int64_t batch, head, token;
};

// One call of the rotation. All of one dtype but the indices. `v` and its target may be null: no values are copied then.
// `write_index` [batch] may be null; else it is added to the token of the targets of k and v (an append to a cache).
struct RopeCall {
  HeadView q, k, v;              // sources
  HeadView q_out, k_out, v_out;  // targets
  const void* positions;         // [3, batch, tokens]
  const void* write_index;
  int64_t batch, tokens;
  int32_t heads, kv_heads;
  int32_t position_bytes, write_index_bytes;
  int32_t dtype;
};

}  // namespace ming
