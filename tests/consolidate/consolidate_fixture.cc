// What the tests of consolidate/ need of the C++ side: tiny artifacts, and what every level of an
// artifact computes.
//
//   consolidate_fixture make llama|bert DIR        DIR/source, DIR/text.txt and DIR/nested
//   consolidate_fixture delta DIR DELTA OUT        DIR/source compressed alike, with a delta
//   consolidate_fixture gar DIR DELTA OUT          the same, its levels with gar pairs
//   consolidate_fixture outputs ARTIFACT TOKEN...  JSON: for each level the logits after every
//   token,
//                                                  or the embedding

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "compress/pipeline.h"
#include "engine/engine.h"
#include "kernels/reference/reference_backend.h"
#include "nlohmann/json.hpp"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

std::string Words(int lines, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int i = 0; i < lines * 6; ++i) {
    // Few words, so that there is something to learn.
    std::mt19937_64 word(random() % 40);
    for (uint64_t letters = 2 + word() % 6; letters > 0; --letters) {
      text += static_cast<char>('a' + word() % 26);
    }
    text += i % 6 < 5 ? ' ' : '\n';
  }
  return text;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeReference() { return MakeReferenceBackend(); }

absl::Status CompressAlike(const std::string& directory, const std::string& delta,
                           const std::string& output, bool has_gar) {
  CompressOptions options;
  options.source = directory + "/source";
  options.output = output;
  options.ladder = LadderChoice::kBoth;
  options.levels = 3;
  options.max_residual_rank = 16;
  options.max_head_residual_rank = 16;
  // What trains are plain factors.
  if (!has_gar) options.gar_levels = std::vector<int>();
  options.refit_tokens = 0;  // as with a delta
  options.delta = delta;
  options.corpus.calibration_paths = {directory + "/text.txt"};
  options.corpus.calibration_tokens = 1024;
  // So few that no level of random weights is left out for measuring worse than a cheaper one.
  options.evaluation_tokens = 64;
  options.self_sample_tokens = 0;
  options.activations = Activations::kFloat;
  options.make_backend = MakeReference;
  return Compress(options).status();
}

absl::Status Make(const std::string& kind, const std::string& directory) {
  const std::string source = directory + "/source";
  NESTOR_RETURN_IF_ERROR(kind == "bert" ? WriteTinyBert(source) : WriteTinyLlama(source));
  NESTOR_RETURN_IF_ERROR(WriteFileAtomically(directory + "/text.txt", Words(300, 1)));
  return CompressAlike(directory, "", directory + "/nested", /*has_gar=*/false);
}

absl::Status Outputs(const std::string& artifact, const std::vector<int32_t>& tokens) {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(artifact));
  const bool is_encoder = model->spec().is_encoder();
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                          OpenEngine(std::move(model), MakeReference, kWindowTokens));
  nlohmann::json outputs = nlohmann::json::array();
  for (size_t level = 0; level < engine->model().levels().size(); ++level) {
    NESTOR_ASSIGN_OR_RETURN(const SequenceId sequence,
                            engine->AddSequence(static_cast<int64_t>(tokens.size())));
    StepPlan plan;
    plan.entries.push_back(
        {.sequence = sequence,
         .tokens = tokens,
         .level = static_cast<int>(level),
         .output = is_encoder ? StepEntry::Output::kEmbedding : StepEntry::Output::kAllLogits});
    NESTOR_ASSIGN_OR_RETURN(const StepResult result, engine->Step(plan));
    const auto& values = result.entries[0].values;
    outputs.push_back(std::vector<float>(values.begin(), values.end()));
    engine->RemoveSequence(sequence);
  }
  std::printf("%s\n", outputs.dump().c_str());
  return absl::OkStatus();
}

absl::Status Run(const std::vector<std::string>& arguments) {
  const std::string command = arguments.empty() ? "" : arguments[0];
  if (command == "make" && arguments.size() == 3) return Make(arguments[1], arguments[2]);
  if ((command == "delta" || command == "gar") && arguments.size() == 4) {
    return CompressAlike(arguments[1], arguments[2], arguments[3], command == "gar");
  }
  if (command == "outputs" && arguments.size() > 2) {
    std::vector<int32_t> tokens;
    for (size_t i = 2; i < arguments.size(); ++i) tokens.push_back(std::atoi(arguments[i].c_str()));
    return Outputs(arguments[1], tokens);
  }
  return absl::InvalidArgumentError("unknown command");
}

}  // namespace
}  // namespace nestor

int main(int argc, char** argv) {
  const absl::Status status = nestor::Run({argv + 1, argv + argc});
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return 1;
}
