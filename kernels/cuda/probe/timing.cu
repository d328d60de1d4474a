#include <algorithm>
#include <cmath>

#include "kernels/cuda/probe/cuda_check.h"
#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {
namespace {

constexpr int kSamples = 11;
constexpr int kWarmUps = 2;
constexpr double kSampleSeconds = 1e-3;
constexpr int64_t kMaxInvocations = 2048;
// Longer than the host needs to launch a graph of kMaxInvocations nodes.
constexpr int kDelayMicroseconds = 200;

__global__ void DelayKernel(int nanoseconds) {
  uint64_t start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < static_cast<uint64_t>(nanoseconds));
}

class Events {
 public:
  Events() {
    Check(cudaEventCreate(&start_));
    Check(cudaEventCreate(&stop_));
  }
  ~Events() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }

  // Seconds of device time that `enqueue` takes.
  template <typename Enqueue>
  double Time(cudaStream_t stream, const Enqueue& enqueue) {
    Check(Delay(kDelayMicroseconds, stream));
    Check(cudaEventRecord(start_, stream));
    enqueue();
    Check(cudaEventRecord(stop_, stream));
    Check(cudaEventSynchronize(stop_));
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
};

template <typename Sample>
Timing TimeTwice(int64_t invocations, const Sample& sample) {
  for (int i = 0; i < kWarmUps; ++i) sample();
  Timing timing;
  timing.invocations = invocations;
  for (double* result : {&timing.first, &timing.second}) {
    std::vector<double> seconds(kSamples);
    for (double& value : seconds) value = sample() / static_cast<double>(invocations);
    *result = Median(&seconds);
  }
  return timing;
}

}  // namespace

double Median(std::vector<double>* seconds) {
  std::sort(seconds->begin(), seconds->end());
  const size_t middle = seconds->size() / 2;
  return seconds->size() % 2 == 1 ? (*seconds)[middle]
                                  : ((*seconds)[middle - 1] + (*seconds)[middle]) / 2;
}

cudaError_t Delay(int microseconds, cudaStream_t stream) {
  DelayKernel<<<1, 1, 0, stream>>>(microseconds * 1000);
  return cudaGetLastError();
}

Timing TimeInGraph(cudaStream_t stream, int64_t min_invocations, const Work& work) {
  constexpr int kTrials = 4;
  Events events;
  for (int i = 0; i < kTrials; ++i) work(stream, i);
  const double estimate = events.Time(stream, [&] {
    for (int i = 0; i < kTrials; ++i) work(stream, i);
  }) / kTrials;
  const int64_t wanted = static_cast<int64_t>(std::ceil(kSampleSeconds / estimate));
  const int64_t invocations =
      std::max(min_invocations, std::min(std::max<int64_t>(wanted, kTrials), kMaxInvocations));
  const Graph graph(stream, [&](cudaStream_t captured) {
    for (int64_t i = 0; i < invocations; ++i) work(captured, i);
  });
  return TimeTwice(invocations, [&] { return events.Time(stream, [&] { graph.Launch(stream); }); });
}

Timing TimeInStream(cudaStream_t stream, int64_t invocations, const Work& work) {
  Events events;
  return TimeTwice(invocations, [&] {
    return events.Time(stream, [&] {
      for (int64_t i = 0; i < invocations; ++i) work(stream, i);
    });
  });
}

Graph::Graph(cudaStream_t stream, const std::function<void(cudaStream_t)>& enqueue) {
  cudaGraph_t graph = nullptr;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream);
  Check(cudaStreamEndCapture(stream, &graph));
  Check(cudaGraphInstantiate(&executable_, graph, 0));
  Check(cudaGraphDestroy(graph));
  Check(cudaGraphUpload(executable_, stream));
  Check(cudaStreamSynchronize(stream));
}

Graph::~Graph() { cudaGraphExecDestroy(executable_); }

void Graph::Launch(cudaStream_t stream) const { Check(cudaGraphLaunch(executable_, stream)); }

}  // namespace nestor::probe
