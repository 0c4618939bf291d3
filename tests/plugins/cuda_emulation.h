// Runs the kernels of plugins/ on the host: every CUDA thread is a fiber, blocks run one after another.
//
// It stands where plugins/common/device.cuh has the device's own instructions, so the kernel sources are what is run.
// Strict where the hardware is lenient by luck: cp.async data arrives only when it is waited for, a barrier that some
// threads never reach is an error, misaligned vector accesses are errors. It cannot show races between blocks, timing,
// or an instruction that is understood wrongly here and there alike.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define MING_DYNAMIC_SHARED(name) unsigned char* name = ::ming::emulation::machine().shared
#define MING_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ming::emulation::launch(grid, block, shared_bytes, [&] { (kernel)(__VA_ARGS__); })

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
using cudaStream_t = void*;
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaFuncAttributeMaxDynamicSharedMemorySize };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ming::emulation {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;

// Threads that meet at one instruction: a warp, a warpgroup or a block. The last to arrive acts for all.
struct Meeting {
  std::vector<void*> arguments;
  unsigned arrived = 0;
  unsigned long generation = 0;
};

struct Copy {
  void* target;
  const void* source;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = true;
  std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                // not committed yet
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps, warpgroups;
  Meeting block;
  unsigned threads = 0;
  unsigned long progress = 0;
  unsigned long conflicts = 0;  // of ldmatrix rows in the same banks
  unsigned running = 0;
  ucontext_t scheduler;
  std::function<void()> body;
  std::unique_ptr<unsigned char[]> storage{new unsigned char[kSharedBytes + 1024]};
  unsigned char* shared = nullptr;
  int major = 9, minor = 0;
  std::string error;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void yield() {
  Machine& m = machine();
  swapcontext(&m.fibers[m.running]->context, &m.scheduler);
}

inline void fail(const char* what) { throw std::runtime_error(what); }

template <class Act>
void meet(Meeting& meeting, unsigned size, unsigned place, void* argument, Act act) {
  Machine& m = machine();
  if (meeting.arguments.size() != size) meeting.arguments.resize(size);
  meeting.arguments[place] = argument;
  m.progress++;
  if (++meeting.arrived == size) {
    act(meeting.arguments);
    meeting.arrived = 0;
    meeting.generation++;
    return;
  }
  const unsigned long mine = meeting.generation;
  while (meeting.generation == mine) yield();
}

template <class Act>
void meet_warp(void* argument, Act act) {
  meet(machine().warps[threadIdx.x / 32], 32, threadIdx.x % 32, argument, act);
}

inline void fiber_main() {
  Machine& m = machine();
  try {
    m.body();
  } catch (const std::exception& e) {
    if (m.error.empty()) m.error = e.what();
  }
  Fiber& fiber = *m.fibers[m.running];
  if (!fiber.open.empty() && m.error.empty()) m.error = "a thread ended with cp.async that it never committed";
  fiber.done = true;
  m.progress++;
  swapcontext(&fiber.context, &m.scheduler);
}

inline void run_block() {
  Machine& m = machine();
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = *m.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.done = false;
    fiber.groups.clear();
    fiber.open.clear();
    makecontext(&fiber.context, fiber_main, 0);
  }
  m.warps.assign((m.threads + 31) / 32, Meeting{});
  m.warpgroups.assign((m.threads + 127) / 128, Meeting{});
  m.block = Meeting{};
  std::memset(m.shared, 0xff, kSharedBytes);  // NaN in every type
  for (bool live = true; live;) {
    live = false;
    const unsigned long before = m.progress;
    for (unsigned i = 0; i < m.threads; ++i) {
      if (m.fibers[i]->done) continue;
      live = true;
      m.running = i;
      threadIdx = m.fibers[i]->index;
      swapcontext(&m.scheduler, &m.fibers[i]->context);
      if (!m.error.empty()) return;
    }
    if (live && m.progress == before) {
      m.error = "deadlock: threads wait at an instruction that others of their group never reach";
      return;
    }
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  Machine& m = machine();
  if (!m.error.empty()) return;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.x > 1024 || shared_bytes > kSharedBytes) {
    m.error = "invalid launch configuration";
    return;
  }
  if (m.shared == nullptr) {
    m.shared = m.storage.get() + (1024 - reinterpret_cast<uintptr_t>(m.storage.get()) % 1024) % 1024;
  }
  while (m.fibers.size() < block.x) {
    m.fibers.push_back(std::make_unique<Fiber>());
    m.fibers.back()->stack.reset(new char[kStackBytes]);
    m.fibers.back()->index = dim3(static_cast<unsigned>(m.fibers.size() - 1), 0, 0);
  }
  m.threads = block.x;
  m.body = std::move(body);
  blockDim = block;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block();
        if (!m.error.empty()) return;
      }
    }
  }
}

}  // namespace ming::emulation

inline int cudaGetLastError() { return ming::emulation::machine().error.empty() ? 0 : 999; }
inline int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const auto& m = ming::emulation::machine();
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? m.major : m.minor;
  return 0;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}

inline void __syncthreads() {
  auto& m = ming::emulation::machine();
  ming::emulation::meet(m.block, m.threads, threadIdx.x, nullptr, [](auto&) {});
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int atomicAdd(int* target, int value) {
  const int before = *target;
  *target += value;
  return before;
}

namespace ming::device {

using emulation::meet_warp;

template <class T>
T shuffle_xor_any(T value, int mask) {
  struct Argument {
    T in, out;
    int mask;
  } argument{value, value, mask};
  meet_warp(&argument, [](std::vector<void*>& all) {
    for (unsigned i = 0; i < 32; ++i) {
      auto* mine = static_cast<Argument*>(all[i]);
      mine->out = static_cast<Argument*>(all[i ^ mine->mask])->in;
    }
  });
  return argument.out;
}
inline float shuffle_xor(float value, int mask) { return shuffle_xor_any(value, mask); }
inline int shuffle_xor(int value, int mask) { return shuffle_xor_any(value, mask); }

inline unsigned ballot(bool predicate) {
  struct Argument {
    bool in;
    unsigned out;
  } argument{predicate, 0};
  meet_warp(&argument, [](std::vector<void*>& all) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(static_cast<Argument*>(all[i])->in) << i;
    for (void* one : all) static_cast<Argument*>(one)->out = votes;
  });
  return argument.out;
}

inline uint4 load_streaming(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) emulation::fail("a 16-byte load is not aligned");
  return *static_cast<const uint4*>(source);
}

// Element `which` of a 32-bit word of T.
template <class T>
float element(uint32_t word, int which) {
  return to_float(T{static_cast<decltype(T::bits)>(word >> (8 * sizeof(T) * which))});
}

template <class T>
void mma_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } argument{d, a, {b0, b1}};
  meet_warp(&argument, [](std::vector<void*>& all) {
    const auto lane = [&](int i) { return static_cast<Argument*>(all[i]); };
    constexpr int kIn = 4 / sizeof(T);  // elements in a word
    constexpr int kDepth = 8 * kIn;
    float a_full[16][kDepth], b_full[kDepth][8];
    for (int i = 0; i < 32; ++i) {
      for (int word = 0; word < 4; ++word) {
        for (int e = 0; e < kIn; ++e) {
          a_full[i / 4 + (word & 1) * 8][i % 4 * kIn + e + (word >> 1) * kDepth / 2] = element<T>(lane(i)->a[word], e);
        }
      }
      for (int word = 0; word < 2; ++word) {
        for (int e = 0; e < kIn; ++e) {
          b_full[i % 4 * kIn + e + word * kDepth / 2][i / 4] = element<T>(lane(i)->b[word], e);
        }
      }
    }
    for (int i = 0; i < 32; ++i) {
      for (int r = 0; r < 4; ++r) {
        double sum = 0;
        for (int k = 0; k < kDepth; ++k) {
          sum += static_cast<double>(a_full[i / 4 + (r >> 1) * 8][k]) * b_full[k][i % 4 * 2 + (r & 1)];
        }
        lane(i)->d[r] = static_cast<float>(lane(i)->d[r] + sum);
      }
    }
  });
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::machine().shared);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("an ldmatrix row is not aligned");
  struct Argument {
    uint32_t* r;
    const unsigned char* row;
  } argument{r, static_cast<const unsigned char*>(row)};
  meet_warp(&argument, [](std::vector<void*>& all) {
    const auto lane = [&](int i) { return static_cast<Argument*>(all[i]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const unsigned bank = 1u << (shared_address(lane(matrix * 8 + i)->row) / 16 % 8);
        if (banks & bank) emulation::machine().conflicts++;
        banks |= bank;
      }
      for (int i = 0; i < 32; ++i) {
        std::memcpy(&lane(i)->r[matrix], lane(matrix * 8 + i / 4)->row + i % 4 * 4, 4);
      }
    }
  });
}

inline void copy_async_16(void* target, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    emulation::fail("a cp.async is not aligned");
  }
  auto& m = emulation::machine();
  m.fibers[m.running]->open.push_back({target, source, valid});
}
inline void copy_async_commit() {
  auto& m = emulation::machine();
  auto& fiber = *m.fibers[m.running];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& m = emulation::machine();
  auto& groups = m.fibers[m.running]->groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
    groups.pop_front();
  }
}

inline void fence_shared_for_wgmma() {}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
inline void wgmma_wait() {}

// Element (row, k) of a descriptor's tile: address bits 4-6 are XOR-ed with bits 7-9, groups of 8 rows stand apart.
template <class T>
float described(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) emulation::fail("a wgmma descriptor without the 128-byte swizzle");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t apart = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + row / 8 * apart + row % 8 * 128 + k * sizeof(T);
  address ^= (address >> 7 & 7) << 4;
  T value;
  std::memcpy(&value, emulation::machine().shared + address, sizeof value);
  return to_float(value);
}

template <class T>
void wgmma_step(float (&d)[64], uint64_t a, uint64_t b) {
  struct Argument {
    float* d;
    uint64_t a, b;
  } argument{d, a, b};
  auto& m = emulation::machine();
  emulation::meet(m.warpgroups[threadIdx.x / 128], 128, threadIdx.x % 128, &argument, [](std::vector<void*>& all) {
    const auto lane = [&](int i) { return static_cast<Argument*>(all[i]); };
    constexpr int kDepth = 32 / sizeof(T);
    std::vector<float> a_full(64 * kDepth), b_full(128 * kDepth);
    for (int r = 0; r < 64; ++r) {
      for (int k = 0; k < kDepth; ++k) a_full[r * kDepth + k] = described<T>(lane(0)->a, r, k);
    }
    for (int r = 0; r < 128; ++r) {
      for (int k = 0; k < kDepth; ++k) b_full[r * kDepth + k] = described<T>(lane(0)->b, r, k);
    }
    for (int i = 0; i < 128; ++i) {
      if (lane(i)->a != lane(0)->a || lane(i)->b != lane(0)->b) emulation::fail("descriptors differ in a warpgroup");
      for (int at = 0; at < 64; ++at) {
        const int row = i / 32 * 16 + i % 32 / 4 + (at >> 1 & 1) * 8;
        const int column = at / 4 * 8 + i % 4 * 2 + (at & 1);
        double sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a_full[row * kDepth + k]) * b_full[column * kDepth + k];
        lane(i)->d[at] = static_cast<float>(lane(i)->d[at] + sum);
      }
    }
  });
}

}  // namespace ming::device

extern "C" {
inline __attribute__((used)) const char* ming_emulation_error() { return ming::emulation::machine().error.c_str(); }
inline __attribute__((used)) void ming_emulation_clear() { ming::emulation::machine().error.clear(); }
inline __attribute__((used)) void ming_emulation_capability(int major, int minor) {
  ming::emulation::machine().major = major;
  ming::emulation::machine().minor = minor;
}
inline __attribute__((used)) unsigned long ming_emulation_conflicts() { return ming::emulation::machine().conflicts; }
}
