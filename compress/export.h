#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "compress/gar.h"
#include "compress/layer.h"
#include "engine/nested_model.h"

namespace nestor {

// Tensors of an artifact on their way to nested.safetensors. How many rows of a factor are kept is
// known only when every layer has been seen, and a model may be larger than memory, so they wait
// in a file. Thread-safe. RESOURCE_EXHAUSTED names the file when the disk is full.
class TensorSpill {
 public:
  static absl::StatusOr<std::unique_ptr<TensorSpill>> Create(const std::string& path);
  ~TensorSpill();  // removes the file

  absl::Status Add(const std::string& name, DType dtype, std::vector<int64_t> shape,
                   std::span<const std::byte> bytes);
  // The bytes of a tensor. REQUIRES: that it was added.
  absl::StatusOr<std::vector<std::byte>> Read(const std::string& name) const;
  // Overwrites a tensor that was added. REQUIRES: the same number of bytes.
  absl::Status Replace(const std::string& name, std::span<const std::byte> bytes);
  // Writes everything to a safetensors file at `path`: of the tensors in `kept_rows` that many
  // rows (0: none of it), of others all. Returns the checksums by name.
  absl::StatusOr<std::map<std::string, std::string>> WriteTensors(
      const std::string& path, const std::map<std::string, int64_t>& kept_rows) const;

 private:
  struct Slot {
    DType dtype;
    std::vector<int64_t> shape;
    int64_t offset;
  };
  TensorSpill(std::string path, int descriptor);
  absl::Status ReadAt(int64_t offset, std::span<std::byte> bytes) const;
  absl::Status WriteAt(int64_t offset, std::span<const std::byte> bytes) const;
  const std::string path_;
  const int fd_;
  mutable Mutex mutex_;
  std::map<std::string, Slot> slots_ ABSL_GUARDED_BY(mutex_);
  int64_t size_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Adds what docs/artifact_format.md lists for a layer, except its bias.
absl::Status AddLayer(const LinearSpec& spec, const LayerParts& parts, TensorSpill* spill);
// Puts new prefix factors in place of those that AddLayer added. REQUIRES: the same rank.
absl::Status ReplacePrefix(const LinearSpec& spec, const FactorPair& factors, TensorSpill* spill);
// The prefix factors as they stand. REQUIRES: that AddLayer added some.
absl::StatusOr<FactorPair> ReadPrefix(const LinearSpec& spec, const TensorSpill& spill);
// Adds the tensors of a gar pair.
absl::Status AddGar(const LinearSpec& spec, const GarPair& pair, TensorSpill* spill);
// Adds what the model reads beside its linear layers' weights: biases, norms, embeddings.
absl::Status AddOtherTensors(const NestedModel& source, TensorSpill* spill);
// INVALID_ARGUMENT names the file and the tensor that holds a NaN or an infinity.
absl::Status CheckFinite(const NestedModel& source);

// Keeps, of each layer's factors, the largest rank that a level uses, and the gar pairs that one
// does: rows by tensor name.
struct StoredRanks {
  std::vector<int64_t> residual;  // by layer
  std::vector<int64_t> prefix;
  std::vector<std::set<int64_t>> gar;
  std::vector<bool> has_middle;
};
StoredRanks StoredRanksOf(const std::vector<Level>& levels, size_t num_layers);
// `added` are the gar pairs in the spill.
std::map<std::string, int64_t> KeptRows(const std::vector<LinearSpec>& layers,
                                        const StoredRanks& ranks,
                                        const std::vector<std::set<int64_t>>& added);

// Copies the files beside the weights (configuration, tokenizer, pooling) that `source` has.
absl::Status CopyModelFiles(const std::string& source, const std::string& destination);

// Syncs `partial` and renames it to `path`, replacing a directory there only where `overwrites`.
absl::Status CommitDirectory(const std::string& partial, const std::string& path, bool overwrites);

}  // namespace nestor
