#include "tests/testing/tiny_nested_model.h"

#include <memory>
#include <random>
#include <span>
#include <vector>

#include "base/file.h"
#include "base/status_macros.h"
#include "compress/pipeline.h"
#include "kernels/cpu/cpu_backend.h"

namespace nestor {
namespace {

std::string RandomText(int lines, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < lines; ++i) {
    for (int letter = 0; letter < 24; ++letter) text += static_cast<char>('a' + random() % 26);
    text += '\n';
  }
  return text;
}

// Ranks along hulls; in so small a layer the middle plane costs less than most of them, so that it
// has every third layer of the last residual level only.
std::vector<Profile> AllocateEveryForm(const LayerOptions& options,
                                       std::span<const int64_t> targets) {
  LayerOptions ranks = options;
  for (std::vector<LayerOption>& layer : ranks) {
    std::erase_if(layer, [](const LayerOption& o) { return o.choice.form == Form::kMiddle; });
  }
  std::vector<Profile> profiles = AllocateAlongHulls(ranks, targets);
  for (size_t i = 0; i < options.size(); i += 3) {
    FormAndRank& choice = profiles.back()[i];
    if (choice.form == Form::kResidual) choice = {Form::kMiddle, 0};
  }
  return profiles;
}

}  // namespace

absl::Status WriteTinyNestedModel(const std::string& directory,
                                  const TinyCheckpointOptions& options) {
  const std::string text = directory + "/text.txt";
  NESTOR_RETURN_IF_ERROR(WriteTinyLlama(directory + "/llama", options));
  NESTOR_RETURN_IF_ERROR(WriteFileAtomically(text, RandomText(400, 1)));
  CompressOptions compress;
  compress.source = directory + "/llama";
  compress.output = directory + "/nested";
  compress.ladder = LadderChoice::kBoth;
  compress.levels = 4;
  compress.max_residual_rank = 16;
  compress.allocate = AllocateEveryForm;
  compress.refit_tokens = 0;
  compress.gar_levels = std::vector<int>();
  compress.corpus.calibration_paths = {text};
  compress.corpus.evaluation_path = text;
  compress.corpus.calibration_tokens = 2560;
  // So few that no level of random weights measures worse than a cheaper one beyond doubt, and is
  // left out.
  compress.evaluation_tokens = 64;
  compress.self_sample_tokens = 0;
  compress.threads = 2;
  compress.make_backend = [] { return MakeCpuBackend({.num_threads = 2}); };
  return Compress(compress).status();
}

}  // namespace nestor
