// Host reference of the MoE kernels, from the same maths (moe.h). Plain loops; the sums over hidden and width are double.
#include <algorithm>
#include <vector>

#include "moe.h"
#include "status.h"

namespace {

using namespace ming;

template <class T>
void route_token(const MoeCall& c, int64_t token, int32_t* experts, float* weights) {
  const int32_t router = c.routers > 1 ? router_of(read_index(c.modality, c.modality_bytes, token)) : 0;
  const T* logits = static_cast<const T*>(c.logits) + (token * c.routers + router) * c.experts;
  std::vector<float> probability(c.experts);
  float largest = to_float(logits[0]);
  for (int32_t e = 1; e < c.experts; ++e) largest = std::fmax(largest, to_float(logits[e]));
  float sum = 0;
  for (int32_t e = 0; e < c.experts; ++e) sum += probability[e] = expf(to_float(logits[e]) - largest);
  for (int32_t e = 0; e < c.experts; ++e) probability[e] /= sum;
  std::vector<char> taken(c.experts);
  float total = 0;
  for (int32_t k = 0; k < c.top_k; ++k) {
    int32_t best = -1;
    for (int32_t e = 0; e < c.experts; ++e) {
      if (taken[e]) continue;
      if (best < 0 || routes_before(route_key(probability[e]), e, route_key(probability[best]), best)) best = e;
    }
    taken[best] = 1;
    experts[k] = best;
    weights[k] = probability[best];
    total += probability[best];
  }
  for (int32_t k = 0; c.normalize && k < c.top_k; ++k) weights[k] /= total;
}

// W is the type of the operands of the products: T, or fp8_t.
template <class T, class W>
int32_t forward(const MoeCall& c) {
  const T* x = static_cast<const T*>(c.x);
  const W* gate_up = static_cast<const W*>(c.gate_up);
  const W* down = static_cast<const W*>(c.down);
  const bool fp8 = c.fp8 != 0;
  std::vector<float> input(c.hidden);
  std::vector<float> inner(c.width);
  std::vector<float> sum(c.hidden);
  const auto dot = [](const W* row, const std::vector<float>& value) {
    double total = 0;
    for (size_t i = 0; i < value.size(); ++i) total += static_cast<double>(to_float(row[i])) * value[i];
    return static_cast<float>(total);
  };
  const auto unit = [&](float scale, const float* rows, int64_t row) { return fp8 ? scale * rows[row] : 1.0f; };
  for (int64_t token = 0; token < c.tokens; ++token) {
    int32_t experts[kMaxTopK];
    float weights[kMaxTopK];
    route_token<T>(c, token, experts, weights);
    for (int32_t i = 0; i < c.hidden; ++i) {
      const float value = to_float(x[token * c.hidden + i]);
      input[i] = fp8 ? to_float(from_float<W>(value * (1.0f / c.x_scale))) : value;
    }
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int32_t k = 0; k < c.top_k; ++k) {
      const int64_t first = int64_t{experts[k]} * 2 * c.width;
      const W* expert = gate_up + first * c.hidden;
      for (int32_t i = 0; i < c.width; ++i) {
        const float gate = dot(expert + int64_t{i} * c.hidden, input) * unit(c.x_scale, c.gate_up_scale, first + i);
        const float up = dot(expert + int64_t{c.width + i} * c.hidden, input) *
                         unit(c.x_scale, c.gate_up_scale, first + c.width + i);
        inner[i] = to_float(from_float<W>(silu(gate) * up * (fp8 ? 1.0f / c.inner_scale : 1.0f)));
      }
      const int64_t row = int64_t{experts[k]} * c.hidden;
      for (int32_t i = 0; i < c.hidden; ++i) {
        sum[i] += weights[k] * (dot(down + (row + i) * c.width, inner) * unit(c.inner_scale, c.down_scale, row + i));
      }
    }
    for (int32_t i = 0; i < c.hidden; ++i) {
      T result = from_float<T>(sum[i]);
      if (c.addend != nullptr) {
        result = from_float<T>(to_float(result) + to_float(static_cast<const T*>(c.addend)[token * c.hidden + i]));
      }
      static_cast<T*>(c.y)[token * c.hidden + i] = result;
    }
  }
  return kOk;
}

template <class T>
int32_t route(const MoeCall& c, int32_t* experts, float* weights) {
  for (int64_t token = 0; token < c.tokens; ++token) {
    route_token<T>(c, token, experts + token * c.top_k, weights + token * c.top_k);
  }
  return kOk;
}

bool sizes_fit(const MoeCall& c) {
  return c.experts >= 1 && c.experts <= kMaxExperts && c.top_k >= 1 && c.top_k <= kMaxTopK && c.top_k <= c.experts &&
         (c.routers == 1 || (c.routers == 3 && c.modality != nullptr)) && c.tokens >= 0;
}

}  // namespace

extern "C" {

int32_t ming_moe_host(const MoeCall* call) {
  if (!sizes_fit(*call)) return kBadShape;
  switch (call->dtype) {
    case kFloat32:
      return call->fp8 ? forward<float, fp8_t>(*call) : forward<float, float>(*call);
    case kFloat16:
      return call->fp8 ? forward<half_t, fp8_t>(*call) : forward<half_t, half_t>(*call);
    case kBFloat16:
      return call->fp8 ? forward<bfloat_t, fp8_t>(*call) : forward<bfloat_t, bfloat_t>(*call);
    default:
      return kBadDtype;
  }
}

// experts int32 and weights float32, both [tokens, top_k], best first.
int32_t ming_moe_route_host(const MoeCall* call, int32_t* experts, float* weights) {
  if (!sizes_fit(*call)) return kBadShape;
  switch (call->dtype) {
    case kFloat32:
      return route<float>(*call, experts, weights);
    case kFloat16:
      return route<half_t>(*call, experts, weights);
    case kBFloat16:
      return route<bfloat_t>(*call, experts, weights);
    default:
      return kBadDtype;
  }
}

}  // extern "C"
