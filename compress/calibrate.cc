#include "compress/calibrate.h"

#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <optional>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "compress/forward.h"
#include "nlohmann/json.hpp"

namespace nestor {

namespace {

using Json = nlohmann::json;

constexpr std::chrono::seconds kSaveInterval(60);

std::string MomentName(size_t input) { return absl::StrCat("moment.", input); }

int64_t PackedSize(int64_t size) { return size * (size + 1) / 2; }

// The upper triangle of [size, size], row by row.
std::vector<float> Pack(const std::vector<float>& matrix, int64_t size) {
  std::vector<float> packed;
  packed.reserve(static_cast<size_t>(PackedSize(size)));
  for (int64_t i = 0; i < size; ++i) {
    packed.insert(packed.end(), matrix.begin() + i * size + i, matrix.begin() + (i + 1) * size);
  }
  return packed;
}

}  // namespace

// Sums of x x^T, upper triangles.
class MomentSums final : public LinearInputObserver {
 public:
  explicit MomentSums(LayerInputs inputs) : inputs_(std::move(inputs)) {
    for (const int64_t size : inputs_.sizes) {
      sums_.emplace_back(static_cast<size_t>(size * size));
      rows_.push_back(0);
    }
    for (size_t layer = 0; layer < inputs_.input_of_layer.size(); ++layer) {
      const bool is_first =
          layer == 0 || inputs_.input_of_layer[layer] != inputs_.input_of_layer[layer - 1];
      is_first_of_input_.push_back(is_first);
    }
  }

  void Observe(size_t layer, const float* inputs, int64_t rows, int64_t cols) override {
    if (!is_first_of_input_[layer]) return;
    const size_t input = inputs_.input_of_layer[layer];
    const int size = static_cast<int>(cols);
    cblas_ssyrk(CblasRowMajor, CblasUpper, CblasTrans, size, static_cast<int>(rows), 1, inputs,
                size, 1, sums_[input].data(), size);
    rows_[input] += rows;
  }

  const LayerInputs& inputs() const { return inputs_; }
  std::vector<std::vector<float>>& sums() { return sums_; }
  std::vector<int64_t>& rows() { return rows_; }

 private:
  const LayerInputs inputs_;
  std::vector<bool> is_first_of_input_;   // by layer
  std::vector<std::vector<float>> sums_;  // by input, [size, size]
  std::vector<int64_t> rows_;             // by input
};

// The files: moments-<sequences done>.safetensors, and calibration.json, which names the current
// one with its checksums and is replaced last.
class MomentDirectory {
 public:
  MomentDirectory(std::string directory, std::string key, int64_t num_sequences)
      : directory_(std::move(directory)), key_(std::move(key)), num_sequences_(num_sequences) {}

  absl::Status Save(MomentSums* sums, int64_t sequences_done) const {
    std::error_code error;
    std::filesystem::create_directories(directory_, error);
    if (error) return FileError(directory_, error.value());
    const std::string path = PathOf(sequences_done);
    NESTOR_ASSIGN_OR_RETURN(const Json checksums, WriteSums(path, sums));
    const Json index = {{"key", key_},
                        {"sequences", num_sequences_},
                        {"sequences_done", sequences_done},
                        {"rows", sums->rows()},
                        {"checksums", checksums}};
    NESTOR_RETURN_IF_ERROR(WriteFileAtomically(IndexPath(), index.dump()));
    for (const auto& entry : std::filesystem::directory_iterator(directory_, error)) {
      const std::string other = entry.path().string();
      if (other != path && other != IndexPath()) std::filesystem::remove(other, error);
    }
    return absl::OkStatus();
  }

  // What is done, or 0: nothing, something else's, or damaged.
  int64_t SequencesDone() const {
    const std::optional<Json> index = ReadIndex();
    return index.has_value() ? (*index)["sequences_done"].get<int64_t>() : 0;
  }

  absl::StatusOr<Calibration> Open(const std::vector<int64_t>& sizes) const {
    const std::optional<Json> index = ReadIndex();
    if (!index.has_value()) {
      return absl::DataLossError(absl::StrCat(directory_, ": no calibration of this model"));
    }
    Calibration calibration;
    NESTOR_ASSIGN_OR_RETURN(calibration.file_,
                            TensorFile::Open({PathOf((*index)["sequences_done"])}));
    calibration.sizes_ = sizes;
    calibration.rows_ = (*index)["rows"].get<std::vector<int64_t>>();
    if (calibration.rows_.size() != sizes.size()) {
      return absl::DataLossError(absl::StrCat(IndexPath(), ": rows: ", calibration.rows_.size(),
                                              " entries, expected ", sizes.size()));
    }
    for (size_t input = 0; input < sizes.size(); ++input) {
      NESTOR_ASSIGN_OR_RETURN(
          const TensorView view,
          calibration.file_->Get(MomentName(input), {PackedSize(sizes[input])}));
      if ((*index)["checksums"].value(MomentName(input), "") != Sha256(view.bytes)) {
        return absl::DataLossError(
            absl::StrCat(view.path, ": tensor ", MomentName(input), ": wrong checksum"));
      }
    }
    return calibration;
  }

  // Fills in the saved sums and returns how many sequences they cover.
  int64_t Restore(MomentSums* sums) const {
    const absl::StatusOr<Calibration> saved = Open(sums->inputs().sizes);
    if (!saved.ok()) return 0;
    for (size_t input = 0; input < sums->sums().size(); ++input) {
      const int64_t size = sums->inputs().sizes[input];
      const absl::StatusOr<std::vector<float>> packed =
          saved->file_->GetFloats(MomentName(input), {PackedSize(size)});
      if (!packed.ok()) return 0;
      auto next = packed->begin();
      for (int64_t i = 0; i < size; ++i) {
        std::copy(next, next + (size - i), sums->sums()[input].begin() + i * size + i);
        next += size - i;
      }
    }
    sums->rows() = saved->rows_;
    return SequencesDone();
  }

 private:
  std::string IndexPath() const { return directory_ + "/calibration.json"; }
  std::string PathOf(int64_t sequences_done) const {
    return absl::StrCat(directory_, "/moments-", sequences_done, ".safetensors");
  }

  std::optional<Json> ReadIndex() const {
    const absl::StatusOr<std::string> text = ReadFile(IndexPath());
    if (!text.ok()) return std::nullopt;
    Json index = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
    const auto is_count = [&](const char* name) {
      return index.contains(name) && index[name].is_number_unsigned();
    };
    if (!index.is_object() || index.value("key", Json()) != key_ || !is_count("sequences") ||
        !is_count("sequences_done") || index["sequences"] != num_sequences_ ||
        !index.value("checksums", Json()).is_object() || !index.value("rows", Json()).is_array()) {
      return std::nullopt;
    }
    for (const Json& rows : index["rows"]) {
      if (!rows.is_number_unsigned()) return std::nullopt;
    }
    return index;
  }

  absl::StatusOr<Json> WriteSums(const std::string& path, MomentSums* sums) const {
    const LayerInputs& inputs = sums->inputs();
    std::vector<TensorFileWriter::Entry> entries;
    for (size_t input = 0; input < inputs.sizes.size(); ++input) {
      entries.push_back({MomentName(input), DType::kF32, {PackedSize(inputs.sizes[input])}});
    }
    NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<TensorFileWriter> writer,
                            TensorFileWriter::Create(path, std::move(entries)));
    for (size_t input = 0; input < inputs.sizes.size(); ++input) {
      const std::vector<float> packed = Pack(sums->sums()[input], inputs.sizes[input]);
      NESTOR_RETURN_IF_ERROR(writer->Write(MomentName(input), std::as_bytes(std::span(packed))));
    }
    NESTOR_RETURN_IF_ERROR(writer->Finish());
    return Json(writer->checksums());
  }

  const std::string directory_;
  const std::string key_;
  const int64_t num_sequences_;
};

LayerInputs LayerInputsOf(const std::vector<LinearSpec>& layers) {
  LayerInputs inputs;
  for (size_t i = 0; i < layers.size(); ++i) {
    const LinearRole role = layers[i].role;
    const bool shares = i > 0 && layers[i].block == layers[i - 1].block &&
                        (role == LinearRole::kKey || role == LinearRole::kValue ||
                         (role == LinearRole::kUp && layers[i - 1].role == LinearRole::kGate));
    if (!shares) inputs.sizes.push_back(layers[i].in);
    inputs.input_of_layer.push_back(inputs.sizes.size() - 1);
  }
  return inputs;
}

absl::StatusOr<std::vector<double>> Calibration::Moment(size_t input) const {
  const int64_t size = sizes_[input];
  NESTOR_ASSIGN_OR_RETURN(const std::vector<float> packed,
                          file_->GetFloats(MomentName(input), {PackedSize(size)}));
  std::vector<double> moment(static_cast<size_t>(size * size));
  const double scale = 1.0 / static_cast<double>(std::max<int64_t>(rows_[input], 1));
  size_t next = 0;
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = i; j < size; ++j) {
      const double value = scale * packed[next++];
      moment[static_cast<size_t>(i * size + j)] = value;
      moment[static_cast<size_t>(j * size + i)] = value;
    }
  }
  return moment;
}

absl::StatusOr<Calibration> OpenCalibration(const std::string& directory, const std::string& key,
                                            int64_t num_sequences, const LayerInputs& inputs) {
  const MomentDirectory store(directory, key, num_sequences);
  absl::StatusOr<Calibration> calibration = store.Open(inputs.sizes);
  if (!calibration.ok() || store.SequencesDone() != num_sequences) {
    return absl::NotFoundError(absl::StrCat(directory, ": no finished calibration"));
  }
  return calibration;
}

absl::StatusOr<Calibration> Calibrate(Engine* engine, const TokenSequences& sequences,
                                      const std::string& key, const std::string& directory,
                                      int64_t* resumed_sequences) {
  const LayerInputs inputs = LayerInputsOf(engine->model().layers());
  const int64_t total = static_cast<int64_t>(sequences.size());
  const MomentDirectory store(directory, key, total);
  int64_t done = 0;
  {
    MomentSums sums(inputs);
    done = store.Restore(&sums);
    if (resumed_sequences != nullptr) *resumed_sequences = done;
    const int full = static_cast<int>(engine->model().levels().size()) - 1;
    const bool is_encoder = engine->model().spec().is_encoder();
    // Encoders take sentences in batches; a window fills a step of its own.
    const int64_t stride = is_encoder ? engine->options().max_sequences : 1;
    Progress progress("Calibrating", CountTokens(sequences));
    progress.Advance(CountTokens({sequences.begin(), sequences.begin() + done}));
    auto saved = std::chrono::steady_clock::now();
    engine->SetObserver(&sums);
    absl::Status status;
    while (done < total && status.ok()) {
      const int64_t end = std::min(done + stride, total);
      const TokenSequences batch(sequences.begin() + done, sequences.begin() + end);
      status = is_encoder ? EmbedSentences(engine, batch, full, &progress).status()
                          : ScoreWindows(engine, batch, full, &progress).status();
      done = end;
      const auto now = std::chrono::steady_clock::now();
      if (status.ok() && (done == total || now - saved > kSaveInterval)) {
        status = store.Save(&sums, done);
        saved = now;
      }
    }
    engine->SetObserver(nullptr);
    NESTOR_RETURN_IF_ERROR(status);
  }
  return store.Open(inputs.sizes);
}

}  // namespace nestor
