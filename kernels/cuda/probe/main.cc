// gpu_probe: measures what a GPU charges for launches, bytes, arithmetic and rank, and writes the
// records as JSON. scripts/gpu_probe.sh runs it and writes docs/gpu_facts.md from them.
//
// Exit status: 0; 1 for wrong usage or a failed call; 2 where no suitable GPU is found; 3 where
// some product failed its check (the file is written, with those records marked).
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/probe/probe.h"
#include "kernels/cuda/probe/random_fill.h"
#include "kernels/cuda/probe/reference.h"

namespace nestor::probe {
namespace {

constexpr int kNoGpu = 2;
constexpr int kCheckFailed = 3;
// Two copies of the largest layer, 128256 × 4096 in bf16, and as much in fp8: what the pools hold.
constexpr int64_t kPoolBytes = int64_t{9} << 28;
constexpr int64_t kMaxRows = 2048;
constexpr int64_t kMaxInputs = 14336;
constexpr int64_t kMaxOutputs = 128256;

struct Question {
  const char* name;
  void (*measure)(const Probe&);
};

constexpr Question kQuestions[] = {
    {"ceilings", MeasureCeilings},   {"launch", MeasureLaunchCost},       {"layers", MeasureLayers},
    {"crossover", MeasureCrossover}, {"strided", MeasureStridedPrefixes}, {"planes", MeasurePlanes},
    {"gemv4", MeasureGemv4},         {"switching", MeasureSwitching},
};

struct Arguments {
  std::string output;
  std::string weights;
  std::string only;  // comma-separated questions; empty: all
};

bool Wants(const Arguments& arguments, const std::string& question) {
  return arguments.only.empty() ||
         ("," + arguments.only + ",").find("," + question + ",") != std::string::npos;
}

bool Parse(int argc, char** argv, Arguments* arguments) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--output") {
      arguments->output = argv[i + 1];
    } else if (flag == "--weights") {
      arguments->weights = argv[i + 1];
    } else if (flag == "--only") {
      arguments->only = argv[i + 1];
    } else {
      return false;
    }
  }
  size_t known = 0, asked = arguments->only.empty() ? 0 : 1;
  for (const char c : arguments->only) asked += c == ',';
  for (const Question& question : kQuestions) {
    known += !arguments->only.empty() && Wants(*arguments, question.name);
  }
  return argc % 2 == 1 && !arguments->output.empty() && known == asked;
}

// False, with a message, where there is no GPU that this program's code runs on.
bool FindGpu(cudaDeviceProp* device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "gpu_probe: no GPU was found (%s): nothing was measured\n",
                 error == cudaSuccess ? "no device" : cudaGetErrorString(error));
    return false;
  }
  Check(cudaGetDeviceProperties(device, 0));
  if (device->major == 9 && device->minor == 0) return true;
  std::fprintf(stderr,
               "gpu_probe: needs a GPU of compute capability 9.0; '%s' has %d.%d: nothing was "
               "measured\n",
               device->name, device->major, device->minor);
  return false;
}

Record DeviceRecord(const cudaDeviceProp& device, const CublasLt& lt) {
  int driver = 0, runtime = 0, clock_khz = 0, memory_clock_khz = 0;
  Check(cudaDriverGetVersion(&driver));
  Check(cudaRuntimeGetVersion(&runtime));
  Check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0));
  Check(cudaDeviceGetAttribute(&memory_clock_khz, cudaDevAttrMemoryClockRate, 0));
  return Record("device", device.name)
      .Set("multiprocessors", device.multiProcessorCount)
      .Set("l2_bytes", device.l2CacheSize)
      .Set("memory_bytes", static_cast<int64_t>(device.totalGlobalMem))
      .Set("max_clock_mhz", clock_khz / 1000)
      .Set("max_memory_clock_mhz", memory_clock_khz / 1000)
      .Set("cuda_driver", driver)
      .Set("cuda_runtime", runtime)
      .Set("cublaslt", lt.version());
}

void MeasureAll(const Arguments& arguments, const cudaDeviceProp& device, const CublasLt& lt,
                Report* report) {
  const auto start = std::chrono::steady_clock::now();
  Probe probe;
  Check(cudaStreamCreate(&probe.stream));
  const WeightPool bf16(NumberType::kBf16, kPoolBytes, device.l2CacheSize);
  const WeightPool fp8(NumberType::kFp8, kPoolBytes, device.l2CacheSize);
  const DeviceBuffer<char> bf16_x(kMaxRows * kMaxInputs * 2), fp8_x(kMaxRows * kMaxInputs);
  const DeviceBuffer<char> y(kMaxRows * kMaxOutputs * 2);
  const auto fill = [&](void* out, NumberType type, int64_t count, uint32_t seed) {
    Check(FillNormal(out, type, count, 1.0f, seed, probe.stream));
  };
  fill(bf16.data(), NumberType::kBf16, bf16.num_elements(), 1);
  fill(fp8.data(), NumberType::kFp8, fp8.num_elements(), 2);
  fill(bf16_x.data(), NumberType::kBf16, kMaxRows * kMaxInputs, 3);
  fill(fp8_x.data(), NumberType::kFp8, kMaxRows * kMaxInputs, 4);
  fill(y.data(), NumberType::kBf16, kMaxRows * kMaxOutputs, 5);
  Check(cudaStreamSynchronize(probe.stream));

  probe.device = device;
  probe.lt = &lt;
  probe.bf16_weights = &bf16;
  probe.fp8_weights = &fp8;
  probe.bf16_x = bf16_x.data();
  probe.fp8_x = fp8_x.data();
  probe.y = y.data();
  probe.report = report;
  probe.weights_path = arguments.weights;
  report->Add(
      Record("reference", "against the host").SetError(ReferenceSelfCheck(probe.stream), 1e-12));
  for (const Question& question : kQuestions) {
    if (!Wants(arguments, question.name)) continue;
    question.measure(probe);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::fprintf(stderr, "gpu_probe: %-10s done after %.0f s\n", question.name, elapsed.count());
  }
  Check(cudaStreamDestroy(probe.stream));
}

int Run(int argc, char** argv) {
  Arguments arguments;
  if (!Parse(argc, argv, &arguments)) {
    std::fprintf(stderr,
                 "usage: gpu_probe --output FILE [--weights FILE] [--only QUESTION,...]\n"
                 "questions:");
    for (const Question& question : kQuestions) std::fprintf(stderr, " %s", question.name);
    std::fprintf(stderr, "\nexample: gpu_probe --output probe.json --only ceilings,launch\n");
    return EXIT_FAILURE;
  }
  cudaDeviceProp device = {};
  if (!FindGpu(&device)) return kNoGpu;
  std::string error;
  const std::unique_ptr<CublasLt> lt = CublasLt::Open(&error);
  if (lt == nullptr) Fail("cublasLt: " + error);
  Report report;
  report.SetDevice(DeviceRecord(device, *lt));
  MeasureAll(arguments, device, *lt, &report);
  if (!report.Write(arguments.output)) Fail(arguments.output + ": cannot be written");
  std::fprintf(stderr, "gpu_probe: %d records, %d failed their check\n", report.num_records(),
               report.num_failed());
  return report.num_failed() == 0 ? EXIT_SUCCESS : kCheckFailed;
}

}  // namespace
}  // namespace nestor::probe

int main(int argc, char** argv) { return nestor::probe::Run(argc, argv); }
