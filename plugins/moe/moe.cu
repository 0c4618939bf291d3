// C entry points of the MoE kernels: device pointers, a stream, a status (common/status.h).
#include "moe_launch.cuh"

extern "C" {

int32_t ming_moe(const ming::MoeCall* call, void* stream) {
  return ming::moe_forward(*call, static_cast<cudaStream_t>(stream));
}

// Bytes of workspace that serve any call of up to `tokens` tokens; negative: a status.
int64_t ming_moe_workspace(int64_t tokens, int32_t hidden, int32_t width, int32_t experts, int32_t top_k) {
  const int32_t status = ming::check_moe(tokens, hidden, width, experts, top_k, false);
  return status == ming::kOk ? ming::moe_workspace(tokens, hidden, width, experts, top_k).bytes : status;
}

}  // extern "C"
