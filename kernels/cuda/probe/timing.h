#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace nestor::probe {

// Medians of one piece of work, timed twice by the same code: the difference is the noise.
struct Timing {
  double first = 0;         // seconds an invocation
  double second = 0;        // the same, timed again
  int64_t invocations = 0;  // in one sample

  double median() const { return (first + second) / 2; }
};

// `seconds` is reordered.
double Median(std::vector<double>* seconds);

// Enqueues invocation i. Rotating over cold weights is the work's own affair.
using Work = std::function<void(cudaStream_t stream, int64_t invocation)>;

// Time of one invocation inside a captured graph of many: at least `min_invocations`, and as many
// as fill a millisecond. A busy kernel ahead of every sample hides the host's time to launch.
Timing TimeInGraph(cudaStream_t stream, int64_t min_invocations, const Work& work);

// The same between events without a graph: for work that cannot be captured, and for single long
// kernels. A sample is `invocations` calls.
Timing TimeInStream(cudaStream_t stream, int64_t invocations, const Work& work);

// Keeps the device busy for about `microseconds`.
cudaError_t Delay(int microseconds, cudaStream_t stream);

// An executable graph of whatever `enqueue` puts into the stream. Owned; not thread-safe.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void(cudaStream_t)>& enqueue);
  Graph(const Graph&) = delete;
  ~Graph();
  void Launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace nestor::probe
