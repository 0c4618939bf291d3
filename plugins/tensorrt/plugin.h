// What the TensorRT plugins share: attributes in and out, refusals in words, and the methods that are the same for all.
#pragma once

#include <NvInfer.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "numeric.h"
#include "status.h"

namespace ming::trt {

using namespace nvinfer1;

constexpr char const* kNamespace = "ming";
constexpr char const* kVersion = "1";

// Says why something was refused, to TensorRT's own log.
void log_error(const std::string& sentence) noexcept;

inline int32_t dtype_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return kFloat32;
    case DataType::kHALF:
      return kFloat16;
    case DataType::kBF16:
      return kBFloat16;
    default:
      return -1;
  }
}

inline int32_t index_bytes(DataType type) { return type == DataType::kINT64 ? 8 : 4; }

// A status of the kernels as TensorRT wants it: 0, or not 0 and a sentence in the log.
inline int32_t reported(const char* plugin, int32_t status) noexcept {
  if (status == kOk) return 0;
  log_error(std::string(plugin) + ": " + status_text(status) + " (status " + std::to_string(status) + ")");
  return 1;
}

// Attributes of one plugin: what the parser hands over, and what is written into the plan. Integers arrive as 32 or 64
// bits, depending on who builds the network.
class Fields {
 public:
  void put(const char* name, PluginFieldType type, const void* data, int32_t length) {
    list_.emplace_back(name, data, type, length);
    collection_.nbFields = static_cast<int32_t>(list_.size());
    collection_.fields = list_.data();
  }
  const PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::vector<PluginField> list_;
  PluginFieldCollection collection_{};
};

inline const PluginField* find_field(const PluginFieldCollection* fields, const char* name) {
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    if (std::strcmp(fields->fields[i].name, name) == 0) return &fields->fields[i];
  }
  return nullptr;
}

inline bool read_ints(const PluginFieldCollection* fields, const char* name, std::vector<int32_t>* out) {
  const PluginField* field = find_field(fields, name);
  if (field == nullptr || field->data == nullptr) return false;
  out->clear();
  for (int32_t i = 0; i < field->length; ++i) {
    if (field->type == PluginFieldType::kINT32) {
      out->push_back(static_cast<const int32_t*>(field->data)[i]);
    } else if (field->type == PluginFieldType::kINT64) {
      out->push_back(static_cast<int32_t>(static_cast<const int64_t*>(field->data)[i]));
    } else {
      return false;
    }
  }
  return !out->empty();
}

inline bool read_int(const PluginFieldCollection* fields, const char* name, int32_t* out) {
  std::vector<int32_t> values;
  if (!read_ints(fields, name, &values) || values.size() != 1) return false;
  *out = values[0];
  return true;
}

inline bool read_float(const PluginFieldCollection* fields, const char* name, float* out) {
  const PluginField* field = find_field(fields, name);
  if (field == nullptr || field->data == nullptr || field->length != 1) return false;
  if (field->type == PluginFieldType::kFLOAT32) {
    *out = *static_cast<const float*>(field->data);
  } else if (field->type == PluginFieldType::kFLOAT64) {
    *out = static_cast<float>(*static_cast<const double*>(field->data));
  } else {
    return false;
  }
  return true;
}

// The methods that do not depend on the plugin. `Derived` has kName and a copy constructor.
template <class Derived>
class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new Derived(static_cast<const Derived&>(*this)); }
  AsciiChar const* getPluginName() const noexcept override { return Derived::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
    return 0;
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    fields_ = Fields{};
    static_cast<Derived*>(this)->put_fields(fields_);
    return fields_.collection();
  }

 protected:
  Plugin() = default;
  Plugin(const Plugin&) : Plugin() {}

 private:
  Fields fields_;
};

// `Made::from_fields` gives a new plugin or null, having said why.
template <class Made>
class Creator : public IPluginCreatorV3One {
 public:
  Creator() { Made::declare_fields(fields_); }
  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
    return Made::from_fields(fields);
  }
  PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
  AsciiChar const* getPluginName() const noexcept override { return Made::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Fields fields_;
};

IPluginCreatorInterface* mrope_creator();
IPluginCreatorInterface* mrope_table_creator();
IPluginCreatorInterface* sparse_moe_creator();
IPluginCreatorInterface* sparse_moe_fp8_creator();

}  // namespace ming::trt
