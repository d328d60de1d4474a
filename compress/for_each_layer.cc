#include "compress/for_each_layer.h"

#include <cblas.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "base/mutex.h"
#include "base/progress.h"

namespace nestor {
namespace {

// OpenBLAS's own threads off while layers run side by side; a decomposition of a few hundred rows
// scales better over layers than inside.
class SingleThreadedBlas {
 public:
  SingleThreadedBlas() : threads_(openblas_get_num_threads()) { openblas_set_num_threads(1); }
  ~SingleThreadedBlas() { openblas_set_num_threads(threads_); }
  SingleThreadedBlas(const SingleThreadedBlas&) = delete;
  SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

 private:
  const int threads_;
};

}  // namespace

absl::Status ForEachLayer(const std::vector<LinearSpec>& layers, int threads,
                          const std::string& label,
                          const std::function<absl::Status(size_t)>& function) {
  // The largest first, so that no thread is left alone with the head at the end.
  std::vector<size_t> order(layers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return layers[a].out * layers[a].in > layers[b].out * layers[b].in;
  });

  const SingleThreadedBlas blas;
  Mutex mutex;  // guards `status` and `progress`
  absl::Status status;
  int64_t weights = 0;
  for (const LinearSpec& layer : layers) weights += layer.out * layer.in;
  Progress progress(label, weights);
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < order.size(); i = next++) {
      const absl::Status done = function(order[i]);
      const MutexLock lock(&mutex);
      status.Update(done);
      if (!status.ok()) next = order.size();
      progress.Advance(layers[order[i]].out * layers[order[i]].in);
    }
  };
  {
    std::vector<std::jthread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
  }
  return status;
}

}  // namespace nestor
