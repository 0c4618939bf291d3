// What every C entry point returns: 0, a CUDA error (positive), or one of these (negative).
#pragma once

#include <cstdint>

namespace ming {

// Counts up when a plugin is added, or a signature or the meaning of an argument changes; stamped into bundles.
constexpr int32_t kPluginAbi = 2;  // 2: SparseMoEFP8

enum Status : int32_t {
  kOk = 0,
  kBadDtype = -1,
  kBadShape = -2,
  kBadAlignment = -3,
  kWorkspaceTooSmall = -4,
  kNoFp8 = -5,
};

inline const char* status_text(int32_t status) {
  switch (status) {
    case kOk:
      return "ok";
    case kBadDtype:
      return "the dtype is not one that this kernel takes (0 float32, 1 float16, 2 bfloat16; MoE takes 1 and 2)";
    case kBadShape:
      return "a size is out of range: see the limits in plugins/README.md";
    case kBadAlignment:
      return "a tensor does not start at a multiple of 16 bytes";
    case kWorkspaceTooSmall:
      return "the workspace is smaller than the *_workspace function says";
    case kNoFp8:
      return "FP8 needs a GPU of compute capability 8.9 or newer";
    default:
      return status > 0 ? "a CUDA error: its number is the status" : "unknown status";
  }
}

}  // namespace ming
