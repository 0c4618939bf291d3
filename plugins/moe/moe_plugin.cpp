// TensorRT plugin `ming::SparseMoE(x [N, H], logits [N, E], gate_up [E, 2I, H], down [E, H, I]) -> y [N, H]`, float16 or
// bfloat16. Attributes `top_k` and `normalize` (ints). It is the node of that name in builders/functions.py.
//
// With a fifth input, modality int32 or int64 [N], logits are [N, 3 E] and each token uses those of its code.
#include "moe.h"

#include "plugin.h"

extern "C" {
int32_t ming_moe(const ming::MoeCall* call, void* stream);
int64_t ming_moe_workspace(int64_t tokens, int32_t hidden, int32_t width, int32_t experts, int32_t top_k);
}

namespace ming::trt {
namespace {

class SparseMoE final : public Plugin<SparseMoE> {
 public:
  static constexpr const char* kName = "SparseMoE";

  SparseMoE(int32_t top_k, int32_t normalize) : top_k_(top_k), normalize_(normalize) {}
  static void declare_fields(Fields& fields) {
    fields.put("top_k", PluginFieldType::kINT32, nullptr, 1);
    fields.put("normalize", PluginFieldType::kINT32, nullptr, 1);
  }
  static IPluginV3* from_fields(const PluginFieldCollection* fields) {
    int32_t top_k = 0;
    int32_t normalize = 0;
    if (!read_int(fields, "top_k", &top_k) || !read_int(fields, "normalize", &normalize) || top_k < 1 ||
        top_k > kMaxTopK) {
      log_error("SparseMoE: needs ints `normalize` and `top_k`, the latter between 1 and " + std::to_string(kMaxTopK));
      return nullptr;
    }
    return new SparseMoE(top_k, normalize);
  }
  void put_fields(Fields& fields) const {
    fields.put("top_k", PluginFieldType::kINT32, &top_k_, 1);
    fields.put("normalize", PluginFieldType::kINT32, &normalize_, 1);
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
    if (at == 4 && inputs == 5) return type == DataType::kINT32 || type == DataType::kINT64;
    return at == 0 ? type == DataType::kHALF || type == DataType::kBF16 : type == all[0].desc.type;
  }
  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    const bool ranks = (count == 4 || count == 5) && in[0].desc.dims.nbDims == 2 && in[1].desc.dims.nbDims == 2 &&
                       in[2].desc.dims.nbDims == 3 && in[3].desc.dims.nbDims == 3;
    if (!ranks) {
      log_error("SparseMoE: takes x [N, H], logits [N, E], gate_up [E, 2I, H], down [E, H, I], and modality [N] or not");
      return 1;
    }
    const Dims& gate_up = in[2].desc.dims;
    const Dims& down = in[3].desc.dims;
    const int64_t routers = count == 5 ? 3 : 1;
    const bool agree = gate_up.d[0] == down.d[0] && gate_up.d[1] == 2 * down.d[2] && gate_up.d[2] == down.d[1] &&
                       in[0].desc.dims.d[1] == down.d[1] && in[1].desc.dims.d[1] == routers * down.d[0];
    if (!agree || workspace(1, down) < 0) {
      log_error("SparseMoE: the shapes of x, logits, gate_up and down do not agree, H or I is no multiple of " +
                std::to_string(row_multiple(false)) + ", or there are more than " + std::to_string(kMaxExperts) + " experts");
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
    call_.top_k = top_k_;
    call_.normalize = normalize_;
    call_.routers = count == 5 ? 3 : 1;
    call_.modality_bytes = count == 5 ? index_bytes(in[4].type) : 0;
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
    call.modality = call.routers == 3 ? inputs[4] : nullptr;
    call.y = outputs[0];
    call.workspace = workspace;
    return reported(kName, ming_moe(&call, stream));
  }

 private:
  int64_t workspace(int64_t tokens, const Dims& down) const {
    return ming_moe_workspace(tokens, static_cast<int32_t>(down.d[1]), static_cast<int32_t>(down.d[2]),
                              static_cast<int32_t>(down.d[0]), top_k_);
  }

  int32_t top_k_;
  int32_t normalize_;
  MoeCall call_{};
};

}  // namespace

IPluginCreatorInterface* sparse_moe_creator() {
  static Creator<SparseMoE> creator;
  return &creator;
}

}  // namespace ming::trt
