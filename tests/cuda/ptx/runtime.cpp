// A runtime without a GPU: what nvcc's host code calls, answered by whoever gave `connect` its
// functions. A launch arrives there with the kernel's name, its shape and its arguments.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Dim {
  unsigned x, y, z;
};

using Launched = int (*)(const char* name, const uint32_t* shape, uint64_t shared, void** arguments);
using Filled = int (*)(void* data, int value, uint64_t bytes);
using Made = void (*)(void* data, int64_t bytes, int written);

Launched on_launch = nullptr;
Filled on_fill = nullptr;
Made on_new = nullptr;
int multiprocessors = 0, most_shared = 0, last_error = 0;

constexpr int kInvalidValue = 1, kTooManyBlocks = 720, kUsualShared = 48 * 1024;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
std::map<const void*, int>& allowed() {
  static std::map<const void*, int> all;
  return all;
}

struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
} pending;

int answer(int error) {
  if (error) last_error = error;
  return error;
}

int launch(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared) {
  const auto asked = allowed().find(kernel);
  const int room = asked == allowed().end() ? kUsualShared : asked->second;
  if (shared > static_cast<size_t>(room)) return answer(kInvalidValue);
  const uint32_t shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return answer(on_launch(names().at(kernel).c_str(), shape, shared, arguments));
}

}  // namespace

extern "C" {

void connect(Launched launched, Filled filled, Made made, int processors, int shared) {
  on_launch = launched;
  on_fill = filled;
  on_new = made;
  multiprocessors = processors;
  most_shared = shared;
}

// What nvcc's host code registers and how it launches.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  std::memcpy(stream, &pending.stream, sizeof(void*));
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared,
                       void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared,
                     void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaLaunchCooperativeKernel(const void* kernel, Dim grid, Dim block, void** arguments,
                                size_t shared, void*) {
  // All blocks must run at once, one a multiprocessor.
  if (grid.x * grid.y * grid.z > static_cast<unsigned>(multiprocessors))
    return answer(kTooManyBlocks);
  return launch(kernel, grid, block, arguments, shared);
}

// What the sources ask for by themselves.
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int error) {
  return error == kInvalidValue    ? "invalid argument"
         : error == kTooManyBlocks ? "too many blocks in cooperative launch"
                                   : "the launch failed";
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int which, int) {
  switch (which) {
    case 16: *value = multiprocessors; return 0;
    case 75: *value = 8; return 0;  // compute capability 8.0
    case 76: *value = 0; return 0;
    case 95: *value = 1; return 0;  // cooperative launches
    case 97: *value = most_shared; return 0;
    default: return answer(kInvalidValue);
  }
}
int cudaFuncSetAttribute(const void* kernel, int which, int value) {
  if (which != 8 || value > most_shared) return answer(kInvalidValue);
  allowed()[kernel] = value;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                           unsigned) {
  *blocks = 1;
  return 0;
}
int cudaMemsetAsync(void* data, int value, size_t bytes, void*) {
  return answer(on_fill(data, value, bytes));
}

// torch's, of which the CPU has none.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

// torch's own, behind which new tensors are told of.
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack,
                                     uint64_t version) {
  using Call = AOTITorchError (*)(const char*, const char*, uint64_t*, uint64_t);
  static const Call call = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Call>(dlsym(torch, "torch_call_dispatcher"));
  }();
  const AOTITorchError error = call(name, overload, stack, version);
  const std::string op = name;
  if (error || (op != "aten::new_empty" && op != "aten::new_zeros" && op != "aten::contiguous"))
    return error;
  const auto tensor = reinterpret_cast<AtenTensorHandle>(stack[0]);
  void* data = nullptr;
  int64_t bytes = 0;
  if (aoti_torch_get_data_ptr(tensor, &data) || aoti_torch_get_storage_size(tensor, &bytes))
    return 1;
  on_new(data, bytes, op != "aten::new_empty");
  return 0;
}

}  // extern "C"
