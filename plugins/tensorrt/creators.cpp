// What TensorRT looks for in a plugin library, and the log that it lends us.
#include "plugin.h"

namespace {

nvinfer1::ILoggerFinder* logger_finder = nullptr;

}  // namespace

namespace ming::trt {

void log_error(const std::string& sentence) noexcept {
  ILogger* logger = logger_finder != nullptr ? logger_finder->findLogger() : nullptr;
  if (logger != nullptr) logger->log(ILogger::Severity::kERROR, sentence.c_str());
}

}  // namespace ming::trt

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {
      ming::trt::mrope_creator(), ming::trt::mrope_table_creator(), ming::trt::sparse_moe_creator(),
      ming::trt::sparse_moe_fp8_creator()};
  count = 4;
  return creators;
}

}  // extern "C"
