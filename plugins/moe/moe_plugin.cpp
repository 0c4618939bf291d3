// TensorRT plugin `ming::SparseMoE(x [N, H], logits [N, E], gate_up [E, 2I, H], down [E, H, I]) -> y [N, H]`, float16 or
// bfloat16. Attributes `top_k` and `normalize` (ints). It is the node of that name in builders/functions.py.
//
// `ming::SparseMoEFP8` has e4m3 gate_up and down, then gate_up_scale float32 [E, 2I] and down_scale float32 [E, H], and
// attributes `x_scale` and `inner_scale` (floats): builders/fp8_experts.py.
//
// With one input more, modality int32 or int64 [N], logits are [N, 3 E] and each token uses those of its code.
#include "moe.h"

#include "plugin.h"

extern "C" {
int32_t ming_moe(const ming::MoeCall* call, void* stream);
int64_t ming_moe_workspace(int64_t tokens, int32_t hidden, int32_t width, int32_t experts, int32_t top_k);
}

namespace ming::trt {
namespace {

struct Attributes {
  int32_t top_k = 0;
  int32_t normalize = 0;
  float x_scale = 0;
  float inner_scale = 0;
};

template <bool kFp8>
class SparseMoE final : public Plugin<SparseMoE<kFp8>> {
 public:
  static constexpr const char* kName = kFp8 ? "SparseMoEFP8" : "SparseMoE";
  // Inputs without modality.
  static constexpr int32_t kInputs = kFp8 ? 6 : 4;

  explicit SparseMoE(const Attributes& attributes) : attributes_(attributes) {}
  static void declare_fields(Fields& fields) {
    fields.put("top_k", PluginFieldType::kINT32, nullptr, 1);
    fields.put("normalize", PluginFieldType::kINT32, nullptr, 1);
    if (kFp8) {
      fields.put("x_scale", PluginFieldType::kFLOAT32, nullptr, 1);
      fields.put("inner_scale", PluginFieldType::kFLOAT32, nullptr, 1);
    }
  }
  static IPluginV3* from_fields(const PluginFieldCollection* fields) {
    Attributes found;
    if (!read_int(fields, "top_k", &found.top_k) || !read_int(fields, "normalize", &found.normalize) ||
        found.top_k < 1 || found.top_k > kMaxTopK) {
      log_error(std::string(kName) + ": needs ints `normalize` and `top_k`, the latter between 1 and " +
                std::to_string(kMaxTopK));
      return nullptr;
    }
    if (kFp8 && !(read_float(fields, "x_scale", &found.x_scale) && read_float(fields, "inner_scale", &found.inner_scale) &&
                  found.x_scale > 0 && found.inner_scale > 0)) {
      log_error(std::string(kName) + ": needs floats `x_scale` and `inner_scale` above 0");
      return nullptr;
    }
    return new SparseMoE(found);
  }
  void put_fields(Fields& fields) const {
    fields.put("top_k", PluginFieldType::kINT32, &attributes_.top_k, 1);
    fields.put("normalize", PluginFieldType::kINT32, &attributes_.normalize, 1);
    if (kFp8) {
      fields.put("x_scale", PluginFieldType::kFLOAT32, &attributes_.x_scale, 1);
      fields.put("inner_scale", PluginFieldType::kFLOAT32, &attributes_.inner_scale, 1);
    }
  }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs, int32_t) const noexcept override {
    outputs[0] = inputs[0];
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
                          IExprBuilder&) noexcept override {
    outputs[0] = inputs[0];
    return 0;
  }
  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t inputs,
                                 int32_t) noexcept override {
    const DataType type = all[at].desc.type;
    if (all[at].desc.format != TensorFormat::kLINEAR) return false;
    if (at == kInputs && inputs == kInputs + 1) return type == DataType::kINT32 || type == DataType::kINT64;
    if (kFp8 && (at == 2 || at == 3)) return type == DataType::kFP8;
    if (kFp8 && (at == 4 || at == 5)) return type == DataType::kFLOAT;
    return at == 0 ? type == DataType::kHALF || type == DataType::kBF16 : type == all[0].desc.type;
  }
  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    bool ranks = (count == kInputs || count == kInputs + 1) && in[0].desc.dims.nbDims == 2 &&
                 in[1].desc.dims.nbDims == 2 && in[2].desc.dims.nbDims == 3 && in[3].desc.dims.nbDims == 3;
    if (kFp8) ranks = ranks && in[4].desc.dims.nbDims == 2 && in[5].desc.dims.nbDims == 2;
    if (!ranks) {
      log_error(std::string(kName) + ": takes x [N, H], logits [N, E], gate_up [E, 2I, H], down [E, H, I], " +
                (kFp8 ? "their scales [E, 2I] and [E, H], " : "") + "and modality [N] or not");
      return 1;
    }
    const Dims& gate_up = in[2].desc.dims;
    const Dims& down = in[3].desc.dims;
    const int64_t routers = count > kInputs ? 3 : 1;
    bool agree = gate_up.d[0] == down.d[0] && gate_up.d[1] == 2 * down.d[2] && gate_up.d[2] == down.d[1] &&
                       in[0].desc.dims.d[1] == down.d[1] && in[1].desc.dims.d[1] == routers * down.d[0];
    if (kFp8) {
      for (int32_t i = 0; i < 2; ++i) {  // a scale for each row
        const Dims& scale = in[4 + i].desc.dims;
        agree = agree && scale.d[0] == down.d[0] && scale.d[1] == in[2 + i].desc.dims.d[1];
      }
      agree = agree && down.d[1] % row_multiple(true) == 0 && down.d[2] % row_multiple(true) == 0;
    }
    if (!agree || workspace(1, down) < 0) {
      log_error(std::string(kName) + ": the shapes of x, logits, gate_up and down do not agree, H or I is no multiple of " +
                std::to_string(row_multiple(kFp8)) + ", or there are more than " + std::to_string(kMaxExperts) + " experts");
      return 1;
    }
    return 0;
  }
  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    const int64_t bytes = workspace(in[0].max.d[0], in[3].desc.dims);
    return bytes > 0 ? static_cast<size_t>(bytes) : 0;
  }
  int32_t onShapeChange(PluginTensorDesc const* in, int32_t count, PluginTensorDesc const*, int32_t) noexcept override {
    call_ = MoeCall{};
    call_.tokens = in[0].dims.d[0];
    call_.hidden = static_cast<int32_t>(in[3].dims.d[1]);
    call_.width = static_cast<int32_t>(in[3].dims.d[2]);
    call_.experts = static_cast<int32_t>(in[3].dims.d[0]);
    call_.top_k = attributes_.top_k;
    call_.normalize = attributes_.normalize;
    call_.routers = count > kInputs ? 3 : 1;
    call_.modality_bytes = count > kInputs ? index_bytes(in[kInputs].type) : 0;
    call_.fp8 = kFp8;
    call_.x_scale = attributes_.x_scale;
    call_.inner_scale = attributes_.inner_scale;
    call_.dtype = dtype_of(in[0].type);
    call_.workspace_bytes = workspace(call_.tokens, in[3].dims);
    return 0;
  }
  int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    MoeCall call = call_;
    call.x = inputs[0];
    call.logits = inputs[1];
    call.gate_up = inputs[2];
    call.down = inputs[3];
    if (kFp8) {
      call.gate_up_scale = static_cast<const float*>(inputs[4]);
      call.down_scale = static_cast<const float*>(inputs[5]);
    }
    call.modality = call.routers == 3 ? inputs[kInputs] : nullptr;
    call.y = outputs[0];
    call.workspace = workspace;
    return reported(kName, ming_moe(&call, stream));
  }

 private:
  int64_t workspace(int64_t tokens, const Dims& down) const {
    return ming_moe_workspace(tokens, static_cast<int32_t>(down.d[1]), static_cast<int32_t>(down.d[2]),
                              static_cast<int32_t>(down.d[0]), attributes_.top_k);
  }

  Attributes attributes_;
  MoeCall call_{};
};

}  // namespace

IPluginCreatorInterface* sparse_moe_creator() {
  static Creator<SparseMoE<false>> creator;
  return &creator;
}

IPluginCreatorInterface* sparse_moe_fp8_creator() {
  static Creator<SparseMoE<true>> creator;
  return &creator;
}

}  // namespace ming::trt
