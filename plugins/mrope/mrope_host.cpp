// Host reference of the rotary kernels, from the same maths (mrope.h). Plain loops; for tests, and for no GPU.
#include "mrope.h"
#include "status.h"

namespace {

using namespace ming;

// Without `cosine` the rows are copied.
template <class T>
void rotate_rows(const Frequencies& f, int64_t batch, int64_t place, const float* cosine,
                 const float* sine, const HeadView& from, const HeadView& to, int32_t heads, int64_t target_place) {
  for (int32_t head = 0; head < heads; ++head) {
    const T* source = static_cast<const T*>(from.data) + batch * from.batch + head * from.head + place * from.token;
    T* target = const_cast<T*>(static_cast<const T*>(to.data)) + batch * to.batch + head * to.head +
                target_place * to.token;
    for (int32_t j = 0; j < f.count; ++j) {
      if (cosine == nullptr) {
        target[j] = source[j];
        target[j + f.count] = source[j + f.count];
        continue;
      }
      float low = to_float(source[j]);
      float high = to_float(source[j + f.count]);
      rotate_pair(low, high, cosine[j], sine[j]);
      target[j] = from_float<T>(low);
      target[j + f.count] = from_float<T>(high);
    }
  }
}

template <class T>
int32_t rotate_all(const RopeCall& c, const Frequencies& f) {
  float cosine[kMaxFrequencies];
  float sine[kMaxFrequencies];
  const int64_t total = c.batch * c.tokens;
  for (int64_t token = 0; token < total; ++token) {
    const int64_t batch = token / c.tokens;
    const int64_t place = token % c.tokens;
    const int64_t position[3] = {read_index(c.positions, c.position_bytes, token),
                                 read_index(c.positions, c.position_bytes, total + token),
                                 read_index(c.positions, c.position_bytes, 2 * total + token)};
    for (int32_t j = 0; j < f.count; ++j) {
      const float angle = rope_angle(f, j, position);
      cosine[j] = std::cos(angle);
      sine[j] = std::sin(angle);
    }
    const int64_t shift = c.write_index != nullptr ? read_index(c.write_index, c.write_index_bytes, batch) : 0;
    rotate_rows<T>(f, batch, place, cosine, sine, c.q, c.q_out, c.heads, place);
    rotate_rows<T>(f, batch, place, cosine, sine, c.k, c.k_out, c.kv_heads, place + shift);
    if (c.v.data != nullptr) {
      rotate_rows<T>(f, batch, place, nullptr, nullptr, c.v, c.v_out, c.kv_heads, place + shift);
    }
  }
  return kOk;
}

}  // namespace

extern "C" {

int32_t ming_mrope_host(const RopeCall* call, const int32_t* axes, int32_t frequencies, float theta) {
  Frequencies f;
  if (!make_frequencies(axes, frequencies, theta, &f)) return kBadShape;
  switch (call->dtype) {
    case kFloat32:
      return rotate_all<float>(*call, f);
    case kFloat16:
      return rotate_all<half_t>(*call, f);
    case kBFloat16:
      return rotate_all<bfloat_t>(*call, f);
    default:
      return kBadDtype;
  }
}

int32_t ming_mrope_table_host(const void* positions, int32_t position_bytes, int64_t length, const void* delta,
                              int32_t delta_bytes, const int32_t* axes, int32_t frequencies, float theta,
                              int64_t max_positions, float* table) {
  Frequencies f;
  if (!make_frequencies(axes, frequencies, theta, &f) || length < 0 || max_positions < length) return kBadShape;
  const int64_t shift = delta != nullptr ? read_index(delta, delta_bytes, 0) : 0;
  for (int64_t place = 0; place < max_positions; ++place) {
    int64_t position[3];
    table_position(positions, position_bytes, length, shift, place, position);
    for (int32_t j = 0; j < f.count; ++j) {
      const float angle = rope_angle(f, j, position);
      table[2 * (place * f.count + j)] = std::cos(angle);
      table[2 * (place * f.count + j) + 1] = std::sin(angle);
    }
  }
  return kOk;
}

// out float32 [frequencies]: radians per unit of position.
int32_t ming_frequencies_host(const int32_t* axes, int32_t frequencies, float theta, float* out) {
  Frequencies f;
  if (!make_frequencies(axes, frequencies, theta, &f)) return kBadShape;
  std::memcpy(out, f.inverse, sizeof(float) * frequencies);
  return kOk;
}

// The conversions of numeric.h, so that a test can walk through every value; dtype 3 is fp8.
void ming_round_host(const float* values, int64_t count, int32_t dtype, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = dtype == kFloat16    ? to_float(from_float<half_t>(values[i]))
             : dtype == kBFloat16 ? to_float(from_float<bfloat_t>(values[i]))
                                  : to_float(from_float<fp8_t>(values[i]));
  }
}

}  // extern "C"
