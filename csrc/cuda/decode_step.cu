// decode_step on CUDA: the next tokens of each sequence through a whole decoder, in one cooperative
// launch of a block a multiprocessor. Not measured on a GPU.
//
// The floor is the bytes: every weight once for up to four tokens, and the keys and
// values so far. In bfloat16 (271.5M and 1079.9M weights) that is 0.54 GB for 270M, 162 us at an
// H100's 3.35 TB/s and 113 us at an H200's 4.8; for 1_1B 2.16 GB, 645 and 450 us, which is 1,551
// and 2,222 tokens/s. The cache adds 33 MB (270M) or 78 MB (1_1B) a sequence of 2048.
//
// A layer is five phases with a barrier after each: 81 barriers a token of 270M, 141 of 1_1B. At an
// assumed 1 to 1.7 us each, with its phase's ramp, that is 81 to 138 us and 141 to 240 us. A part
// of it is hidden: prefetch_task() asks for weights before each barrier, so that memory doesn't
// wait with the blocks.
//
// Layer-wise scaling is in the table of layers (elmkernels/weights/table.py), which lies on the
// device. The schedule is arithmetic over it (decode/plan.cuh). Numbers are rounded where the
// reference rounds: outputs of norms, projections, rotations, additions. The rest is float32.
#include "cuda/decode/phases.cuh"

namespace {

using decode::Step;

// A poll of the barrier is a way to the second-level cache and back, about half a microsecond: so
// many are eight seconds at least. A whole launch takes milliseconds.
constexpr uint32_t kPolls = 1u << 24;

// All blocks arrive before any leaves. The count only grows: `target` is the grid times how often.
// If it isn't reached the launch traps, so that the device is free again and its user is told.
__device__ __forceinline__ void grid_barrier(uint32_t* arrived, uint32_t target) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    for (uint32_t polls = 0, seen = 0; seen < target; ++polls) {
      if (polls == kPolls) __trap();
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    }
    __threadfence();
  }
  __syncthreads();
}

template <class T, int B>
__global__ void __launch_bounds__(decode::kBlock, 1)
    decode_step_kernel(const __grid_constant__ Step<T> step) {
  decode::Block block{static_cast<int>(blockIdx.x)};
  const int phases = decode::phases_of(step.layers);
  for (int i = 0; i < phases; ++i) {
    if (i > 0)
      grid_barrier(reinterpret_cast<uint32_t*>(step.scratch), static_cast<uint32_t>(i) * gridDim.x);
    decode::run_phase<B>(block, step, i);
  }
}

int attribute(const Tensor& x, cudaDeviceAttr which, const char* what) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, x.get_device_index()), what);
  return value;
}

template <int B, class T>
void launch(Step<T>& step, int64_t shared, cudaStream_t stream) {
  void* kernel = reinterpret_cast<void*>(decode_step_kernel<T, B>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "asking for shared memory");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, decode::kBlock, shared),
        "asking how many blocks fit");
  STD_TORCH_CHECK(blocks >= 1, "decode_step needs a multiprocessor that holds a block of ",
                  decode::kBlock, " threads with ", shared,
                  " bytes of shared memory, this one holds none");
  void* arguments[] = {&step};
  check(cudaMemsetAsync(step.scratch, 0, step.at.zeroed, stream), "clearing decode_step's counts");
  check(cudaLaunchCooperativeKernel(kernel, dim3(step.grid), dim3(decode::kBlock), arguments,
                                    shared, stream),
        "launching decode_step");
}

// The most tokens, up to kMaxRows, that share a pass over the weights in the shared memory.
template <class T>
void launch(Step<T>& step, const Tensor& arena, cudaStream_t stream) {
  constexpr int64_t kStatic = 128;  // more than the kernel has beside its dynamic memory
  const int64_t room = attribute(arena, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 "asking for the size of shared memory") -
                       kStatic;
  const int64_t widest = std::max({step.dim, step.qkv_width, step.ffn_dim});
  const auto bytes = [&](int rows) {
    return decode::shared_bytes(rows, widest, step.qkv_width, step.head_dim, sizeof(T));
  };
  STD_TORCH_CHECK(bytes(1) <= room, "decode_step needs ", bytes(1),
                  " bytes of shared memory for a block (inputs of ", widest,
                  " columns), this device has ", room);
  constexpr int kRows = decode::kMaxRows;
  if (step.batch > 1 && bytes(kRows) <= room) return launch<kRows>(step, bytes(kRows), stream);
  launch<1>(step, bytes(1), stream);
}

Tensor decode_step_fwd(const Tensor& table, const Tensor& tokens, const Tensor& positions,
                       Optional sequences, Tensor arena, const Tensor& offsets,
                       const Tensor& rope_table, int64_t max_length, int64_t vocab_size, bool gated,
                       double eps, int64_t model_dim, int64_t qkv_width, int64_t ffn_dim,
                       int64_t arena_batch, Optional chosen) {
  const int64_t batch = tokens.size(0), layers = table.size(0) - 1;
  const int64_t shape[] = {batch, vocab_size};
  Tensor logits = torch::stable::new_empty(arena, {shape, 2});
  if (logits.numel() == 0) return logits;
  STD_TORCH_CHECK(layers <= decode::kMaxLayers, "decode_step on CUDA takes at most ",
                  decode::kMaxLayers, " layers, got ", layers);
  STD_TORCH_CHECK(vocab_size <= UINT32_MAX, "decode_step on CUDA numbers tokens by 32 bits, got ",
                  vocab_size, " of them");
  STD_TORCH_CHECK(attribute(arena, cudaDevAttrCooperativeLaunch, "asking for cooperative launches"),
                  "decode_step needs a device with cooperative launches, this one has none");
  const torch::stable::accelerator::DeviceGuard guard(arena.get_device_index());
  with_dtype(arena, [&](auto t) {
    using T = decltype(t);
    Step<T> step{};
    step.grid = multiprocessors(arena);
    step.at = decode::scratch_of(batch, model_dim, qkv_width, ffn_dim, rope_table.size(1),
                                 max_length, sizeof(T), step.grid);
    const int64_t size[] = {step.at.bytes};
    Tensor scratch = torch::stable::new_empty(arena, {size, 1}, ScalarType::Byte);
    step.table = data<const int64_t>(table);
    step.tokens = data<const int64_t>(tokens);
    step.positions = data<const int64_t>(positions);
    step.sequences = sequences ? data<const int64_t>(*sequences) : nullptr;
    step.arena_batch = arena_batch;
    step.arena = data<T>(arena);
    step.rope_table = data<const float>(rope_table);
    step.logits = data<T>(logits);
    step.chosen = chosen ? data<int64_t>(*chosen) : nullptr;
    step.scratch = data<uint8_t>(scratch);
    step.rope_length = rope_table.size(0);
    step.max_length = max_length;
    step.dim = model_dim;
    step.head_dim = rope_table.size(1);
    step.qkv_width = qkv_width;
    step.ffn_dim = ffn_dim;
    step.vocab_size = vocab_size;
    step.layers = static_cast<int>(layers);
    step.batch = static_cast<int>(batch);
    step.gated = gated;
    step.eps = static_cast<float>(eps);
    const int64_t* places = data<const int64_t>(offsets);
    std::copy(places, places + 2 * layers, &step.offsets[0][0]);
    launch(step, arena, stream_of(arena));
  });
  return logits;
}

}  // namespace

ELMKERNELS_IMPL(m) { m.impl("decode_step_fwd", TORCH_BOX(&decode_step_fwd)); }
