// TensorRT plugins `ming::MRope` and `ming::MRopeTable`.
//
// MRope(q [B, N, S, D], k [B, M, S, D], position_ids int32 or int64 [3, B, S]) -> q and k, rotated. Attributes `theta`
// (float) and `axes` (ints [D/2]). It is the node of that name in builders/functions.py.
//
// MRopeTable(position_ids int32 or int64 [3, L], delta int32 or int64 [1]) -> float32 [max_positions, D/2, 2], (cos, sin)
// per place: L <= max_positions places of the prompt, then place + delta. Attributes also `max_positions` (int).
#include "mrope.h"

#include "plugin.h"

extern "C" {
int32_t ming_mrope(const ming::RopeCall* call, const int32_t* axes, int32_t frequencies, float theta, void* stream);
int32_t ming_mrope_table(const void* positions, int32_t position_bytes, int64_t length, const void* delta,
                         int32_t delta_bytes, const int32_t* axes, int32_t frequencies, float theta,
                         int64_t max_positions, float* table, void* stream);
}

namespace ming::trt {
namespace {

bool is_linear(const DynamicPluginTensorDesc& tensor) { return tensor.desc.format == TensorFormat::kLINEAR; }
bool is_index(DataType type) { return type == DataType::kINT32 || type == DataType::kINT64; }

struct RopeAttributes {
  std::vector<int32_t> axes;
  float theta = 0;

  bool read(const char* plugin, const PluginFieldCollection* fields) {
    Frequencies unused;
    if (!read_ints(fields, "axes", &axes) || !read_float(fields, "theta", &theta) ||
        !make_frequencies(axes.data(), static_cast<int32_t>(axes.size()), theta, &unused)) {
      log_error(std::string(plugin) + ": needs a positive float `theta` and ints `axes` of 0, 1 or 2, at most " +
                std::to_string(kMaxFrequencies) + " of them");
      return false;
    }
    return true;
  }
  void put(Fields& fields) const {
    fields.put("theta", PluginFieldType::kFLOAT32, &theta, 1);
    fields.put("axes", PluginFieldType::kINT32, axes.data(), static_cast<int32_t>(axes.size()));
  }
  static void declare(Fields& fields) {
    fields.put("theta", PluginFieldType::kFLOAT32, nullptr, 1);
    fields.put("axes", PluginFieldType::kINT32, nullptr, 1);
  }
  int32_t count() const { return static_cast<int32_t>(axes.size()); }
};

class MRope final : public Plugin<MRope> {
 public:
  static constexpr const char* kName = "MRope";

  explicit MRope(RopeAttributes attributes) : attributes_(std::move(attributes)) {}
  static void declare_fields(Fields& fields) { RopeAttributes::declare(fields); }
  static IPluginV3* from_fields(const PluginFieldCollection* fields) {
    RopeAttributes attributes;
    return attributes.read(kName, fields) ? new MRope(attributes) : nullptr;
  }
  void put_fields(Fields& fields) const { attributes_.put(fields); }

  int32_t getNbOutputs() const noexcept override { return 2; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs, int32_t) const noexcept override {
    outputs[0] = outputs[1] = inputs[0];
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
                          IExprBuilder&) noexcept override {
    outputs[0] = inputs[0];
    outputs[1] = inputs[1];
    return 0;
  }
  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t, int32_t) noexcept override {
    if (!is_linear(all[at])) return false;
    const DataType type = all[at].desc.type;
    if (at == 2) return is_index(type);
    return at == 0 ? dtype_of(type) >= 0 : type == all[0].desc.type;
  }
  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    const Dims& q = in[0].desc.dims;
    if (count != 3 || q.nbDims != 4 || in[1].desc.dims.nbDims != 4 || in[2].desc.dims.nbDims != 3 ||
        q.d[3] != 2 * attributes_.count()) {
      log_error("MRope: takes q and k of four dimensions, the last twice as long as `axes`, and position_ids [3, B, S]");
      return 1;
    }
    return 0;
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void*, cudaStream_t stream) noexcept override {
    const auto view = [](const void* data, const Dims& d) {
      return HeadView{data, d.d[1] * d.d[2] * d.d[3], d.d[2] * d.d[3], d.d[3]};
    };
    RopeCall call{};
    call.q = view(inputs[0], in[0].dims);
    call.k = view(inputs[1], in[1].dims);
    call.q_out = view(outputs[0], in[0].dims);
    call.k_out = view(outputs[1], in[1].dims);
    call.positions = inputs[2];
    call.batch = in[0].dims.d[0];
    call.tokens = in[0].dims.d[2];
    call.heads = static_cast<int32_t>(in[0].dims.d[1]);
    call.kv_heads = static_cast<int32_t>(in[1].dims.d[1]);
    call.position_bytes = index_bytes(in[2].type);
    call.dtype = dtype_of(in[0].type);
    return reported(kName,
                    ming_mrope(&call, attributes_.axes.data(), attributes_.count(), attributes_.theta, stream));
  }

 private:
  RopeAttributes attributes_;
};

class MRopeTable final : public Plugin<MRopeTable> {
 public:
  static constexpr const char* kName = "MRopeTable";

  MRopeTable(RopeAttributes attributes, int32_t max_positions)
      : attributes_(std::move(attributes)), max_positions_(max_positions) {}
  static void declare_fields(Fields& fields) {
    RopeAttributes::declare(fields);
    fields.put("max_positions", PluginFieldType::kINT32, nullptr, 1);
  }
  static IPluginV3* from_fields(const PluginFieldCollection* fields) {
    RopeAttributes attributes;
    int32_t max_positions = 0;
    if (!attributes.read(kName, fields)) return nullptr;
    if (!read_int(fields, "max_positions", &max_positions) || max_positions < 1) {
      log_error("MRopeTable: needs a positive int `max_positions`");
      return nullptr;
    }
    return new MRopeTable(attributes, max_positions);
  }
  void put_fields(Fields& fields) const {
    attributes_.put(fields);
    fields.put("max_positions", PluginFieldType::kINT32, &max_positions_, 1);
  }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType*, int32_t) const noexcept override {
    outputs[0] = DataType::kFLOAT;
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
                          IExprBuilder& builder) noexcept override {
    outputs[0].nbDims = 3;
    outputs[0].d[0] = builder.constant(max_positions_);
    outputs[0].d[1] = builder.constant(attributes_.count());
    outputs[0].d[2] = builder.constant(2);
    return 0;
  }
  bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const* all, int32_t, int32_t) noexcept override {
    const DataType type = all[at].desc.type;
    return is_linear(all[at]) && (at < 2 ? is_index(type) : type == DataType::kFLOAT);
  }
  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t count, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    if (count != 2 || in[0].desc.dims.nbDims != 2 || in[0].max.d[1] > max_positions_) {
      log_error("MRopeTable: takes position_ids [3, L] with L up to `max_positions`, and delta [1]");
      return 1;
    }
    return 0;
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void*, cudaStream_t stream) noexcept override {
    const int32_t status =
        ming_mrope_table(inputs[0], index_bytes(in[0].type), in[0].dims.d[1], inputs[1], index_bytes(in[1].type),
                         attributes_.axes.data(), attributes_.count(), attributes_.theta, max_positions_,
                         static_cast<float*>(outputs[0]), stream);
    return reported(kName, status);
  }

 private:
  RopeAttributes attributes_;
  int32_t max_positions_;
};

}  // namespace

IPluginCreatorInterface* mrope_creator() {
  static Creator<MRope> creator;
  return &creator;
}

IPluginCreatorInterface* mrope_table_creator() {
  static Creator<MRopeTable> creator;
  return &creator;
}

}  // namespace ming::trt
