// C entry points of the rotary kernels: device pointers, a stream, a status (common/status.h).
#include "mrope_kernels.cuh"

extern "C" {

int32_t ming_plugin_abi() { return ming::kPluginAbi; }

const char* ming_status_text(int32_t status) { return ming::status_text(status); }

// Rotates q and k as `call` says; `axes` [frequencies] on the host.
int32_t ming_mrope(const ming::RopeCall* call, const int32_t* axes, int32_t frequencies, float theta, void* stream) {
  ming::Frequencies f;
  if (!ming::make_frequencies(axes, frequencies, theta, &f)) return ming::kBadShape;
  return ming::rotate(*call, f, static_cast<cudaStream_t>(stream));
}

// Fills `table` float32 [max_positions, frequencies, 2] with (cos, sin): the positions [3, length] of a prompt, then
// place + *delta (`delta` is on the device and may be null).
int32_t ming_mrope_table(const void* positions, int32_t position_bytes, int64_t length, const void* delta,
                         int32_t delta_bytes, const int32_t* axes, int32_t frequencies, float theta,
                         int64_t max_positions, float* table, void* stream) {
  ming::TableLaunch launch{};
  if (!ming::make_frequencies(axes, frequencies, theta, &launch.frequencies)) return ming::kBadShape;
  launch.positions = positions;
  launch.delta = delta;
  launch.table = table;
  launch.length = length;
  launch.max_positions = max_positions;
  launch.position_bytes = position_bytes;
  launch.delta_bytes = delta_bytes;
  return ming::fill_table(launch, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
