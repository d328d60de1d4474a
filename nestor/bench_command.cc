#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "engine/engine.h"
#include "engine/interpolate.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/machine_probe.h"
#include "nestor/bench_measure.h"
#include "nestor/bench_speculation.h"
#include "nestor/command.h"
#include "nestor/flags.h"
#include "nestor/text_input.h"
#include "nestor/text_table.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

constexpr size_t kRandomTexts = 32;    // of an encoder, unless a batch is larger
constexpr int64_t kMaxStepRows = 512;  // as in the daemon's default configuration
constexpr int kMaxRows = 512;

struct BenchFlags {
  int64_t threads = 0;
  bool pin_threads = false;
  std::optional<std::string> instruction_set;
  std::string kv_cache_type = "bf16";
  std::optional<std::string> levels;
  std::vector<std::string> extra_costs;
  std::string rows = "1,4,16";
  std::string mixed_rows = "2,4,8,32";
  std::optional<int64_t> prompt_tokens;
  std::optional<std::string> texts;
  std::string batch = "32";
  int64_t context = 16;
  int64_t tokens = 64;
  int64_t rounds = 5;
  bool speculate = false;
  std::optional<std::string> prompts;
  bool json = false;
};

// The flags, checked against the model.
struct BenchPlan {
  int threads = 1;
  bool pin_threads = false;
  std::vector<int> levels;
  std::vector<int> rows;
  std::vector<int> mixed_rows;
  std::vector<int> batches;
  int64_t prompt_tokens = 0;
  int64_t context = 0;
  int64_t tokens = 0;
  int rounds = 1;
};

struct DecodeRow {
  int level = 0;
  int64_t rows = 0;
  Timing measured;
};

struct PromptRow {
  int level = 0;
  Timing measured;
};

// An encoder's texts, `batch` at a time.
struct EmbedRow {
  int level = 0;
  int batch = 0;
  Timing measured;
};

// Rows at several levels, the lowest and the full one among them, run in every way there is.
struct MixedRow {
  std::vector<int> levels;  // one for each row
  Timing chosen;            // as the engine chose
  Timing as_asked;
  Timing pass_per_level;
  Timing raised;  // all at the full level

  double chosen_against_best() const {
    return chosen.seconds / std::min(pass_per_level.seconds, raised.seconds);
  }
};

struct BenchReport {
  std::string model;
  std::string cpu;
  double read_gbps = 0;
  double gemm_gflops = 0;
  bool is_encoder = false;
  BenchPlan plan;
  std::vector<DecodeRow> decode;
  std::vector<PromptRow> prefill;
  size_t num_texts = 0;
  std::vector<EmbedRow> embed;
  std::vector<MixedRow> mixed;
  std::optional<SpeculationReport> speculation;  // then nothing else is measured
};

void Declare(Flags* flags, BenchFlags* values) {
  flags->Add("threads", &values->threads, "threads; 0: as many as this process may use");
  flags->Add("pin-threads", &values->pin_threads,
             "pins every thread but the main one to a CPU of its own");
  flags->Add("instruction-set", &values->instruction_set,
             "portable, avx2, avx512 or avx512_bf16 (default: the best this machine has)");
  flags->Add("kv-cache-type", &values->kv_cache_type, "bf16 or fp32");
  flags->Add("levels", &values->levels, "levels to measure, e.g. 0,3 (default: all)");
  flags->Add("extra-cost", &values->extra_costs,
             "a level between the model's own, as engine.extra_costs of nestord: 0.65 or "
             "prefix:0.65; may be given several times");
  flags->Add("rows", &values->rows, "sequences that decode together");
  flags->Add("mixed-rows", &values->mixed_rows,
             "sequences that decode together at several of the levels");
  flags->Add("prompt-tokens", &values->prompt_tokens,
             "tokens of a prompt (default: 512), or of an encoder's sentence (default: 16)");
  flags->Add("texts", &values->texts,
             "sentences for an encoder, one a line, instead of random ones");
  flags->Add("batch", &values->batch, "sentences that an encoder takes together");
  flags->Add("context", &values->context, "tokens before the first decoded one");
  flags->Add("tokens", &values->tokens, "tokens decoded by each sequence");
  flags->Add("rounds", &values->rounds, "measurements of each figure; the median counts");
  flags->Add("speculate", &values->speculate,
             "measures speculative decoding instead: the dearest of the levels verifies");
  flags->Add("prompts", &values->prompts, "one prompt a line, - for stdin; needs --speculate");
  flags->Add("json", &values->json, "one object on stdout");
}

absl::StatusOr<KvCacheType> ParseKvCacheType(const std::string& name) {
  if (name == "bf16") return KvCacheType::kBfloat16;
  if (name == "fp32") return KvCacheType::kFloat32;
  return UsageError(absl::StrCat("--kv-cache-type: ", name, ", expected bf16 or fp32"));
}

absl::Status CheckPositive(const char* name, int64_t value, int64_t max) {
  if (value >= 1 && value <= max) return absl::OkStatus();
  return UsageError(absl::StrCat("--", name, ": expected 1 to ", max, "; was ", value));
}

absl::StatusOr<BenchPlan> MakePlan(const BenchFlags& flags, const NestedModel& model) {
  const int64_t context_length = model.spec().context_length;
  const bool is_encoder = model.spec().is_encoder();
  BenchPlan plan = {
      .threads = flags.threads == 0 ? AvailableCpus() : static_cast<int>(flags.threads),
      .pin_threads = flags.pin_threads,
      .levels = {},
      .rows = {},
      .batches = {},
      .prompt_tokens =
          flags.prompt_tokens.value_or(std::min<int64_t>(is_encoder ? 16 : 512, context_length)),
      .context = flags.context,
      .tokens = flags.tokens,
      .rounds = static_cast<int>(flags.rounds)};
  if (flags.threads != 0) NESTOR_RETURN_IF_ERROR(CheckPositive("threads", flags.threads, 1024));
  // A text of an encoder runs in one step.
  NESTOR_RETURN_IF_ERROR(
      CheckPositive("prompt-tokens", plan.prompt_tokens,
                    is_encoder ? std::min(context_length, kMaxStepRows) : context_length));
  NESTOR_RETURN_IF_ERROR(CheckPositive("rounds", flags.rounds, 1000));
  if (!is_encoder) {
    NESTOR_RETURN_IF_ERROR(CheckPositive("context", flags.context, context_length - 1));
    NESTOR_RETURN_IF_ERROR(CheckPositive("tokens", flags.tokens, context_length - flags.context));
  }
  const int num_levels = static_cast<int>(model.levels().size());
  if (flags.levels) {
    NESTOR_ASSIGN_OR_RETURN(plan.levels, ParseIntegers("levels", *flags.levels, 0, num_levels - 1));
  } else {
    plan.levels.resize(num_levels);
    std::iota(plan.levels.begin(), plan.levels.end(), 0);
  }
  NESTOR_ASSIGN_OR_RETURN(plan.rows, ParseIntegers("rows", flags.rows, 1, kMaxRows));
  NESTOR_ASSIGN_OR_RETURN(plan.mixed_rows,
                          ParseIntegers("mixed-rows", flags.mixed_rows, 2, kMaxRows));
  NESTOR_ASSIGN_OR_RETURN(plan.batches, ParseIntegers("batch", flags.batch, 1, kMaxRows));
  if (flags.texts && !is_encoder) {
    return UsageError(absl::StrCat("--texts: ", model.directory(), " is no encoder"));
  }
  return plan;
}

// A cache that holds what the plan needs and no more: the default would take a large part of the
// machine's memory.
EngineOptions OptionsFor(const BenchPlan& plan, const ModelSpec& spec) {
  EngineOptions options = {.max_step_rows = kMaxStepRows};
  options.max_sequences =
      std::max<int64_t>({*std::max_element(plan.batches.begin(), plan.batches.end()),
                         static_cast<int64_t>(plan.levels.size()) * 4,
                         *std::max_element(plan.rows.begin(), plan.rows.end())});
  const int64_t length = std::max(plan.prompt_tokens, plan.context + plan.tokens);
  const int64_t positions = options.max_sequences * (length + options.page_size);
  // Keys and values, at the widest type that a backend may keep them in.
  options.kv_cache_bytes = positions * spec.num_blocks * 2 * spec.num_kv_heads * spec.head_dim *
                           static_cast<int64_t>(sizeof(double));
  return options;
}

using Job = std::function<absl::StatusOr<Timing>()>;

// What the machine can do, in every round anew: it changes from second to second.
void AddMachineJobs(int threads, CpuInstructionSet instruction_set, Timing* reading,
                    Timing* multiplying, std::vector<Job>* jobs, std::vector<Timing*>* results) {
  constexpr int64_t kGiga = 1'000'000'000;
  results->push_back(reading);
  jobs->push_back([=]() -> absl::StatusOr<Timing> {
    NESTOR_ASSIGN_OR_RETURN(const double gbps, MeasureReadBandwidth(threads));
    return Timing{.seconds = 1 / gbps, .weight_bytes = kGiga};
  });
  results->push_back(multiplying);
  jobs->push_back([=]() -> absl::StatusOr<Timing> {
    NESTOR_ASSIGN_OR_RETURN(const double gflops, MeasureGemmRate(threads, instruction_set));
    return Timing{.seconds = 1 / gflops, .flops = kGiga};
  });
}

// `rows` levels from the first to the last of `levels`, evenly; each several times where there are
// more rows than levels. REQUIRES: rows >= 2.
std::vector<int> MixedLevels(const std::vector<int>& levels, int rows) {
  std::vector<int> result;
  const auto last = static_cast<int64_t>(levels.size()) - 1;
  for (int64_t i = 0; i < rows; ++i) result.push_back(levels[i * last / (rows - 1)]);
  return result;
}

void AddDecoderJobs(const BenchPlan& plan, EngineTimer* timer, BenchReport* report,
                    std::vector<Job>* jobs, std::vector<Timing*>* results) {
  // Reserved, since `results` points into them.
  report->decode.reserve(plan.levels.size() * plan.rows.size());
  report->prefill.reserve(plan.levels.size());
  report->mixed.reserve(plan.mixed_rows.size());
  for (const int rows : plan.rows) {
    for (const int level : plan.levels) {
      report->decode.push_back({.level = level, .rows = rows, .measured = {}});
      results->push_back(&report->decode.back().measured);
      jobs->push_back([=] {
        return timer->Decode({.levels = std::vector<int>(rows, level),
                              .context = plan.context,
                              .steps = plan.tokens});
      });
    }
  }
  for (const int level : plan.levels) {
    report->prefill.push_back({.level = level, .measured = {}});
    results->push_back(&report->prefill.back().measured);
    jobs->push_back([=] { return timer->Prefill(level, plan.prompt_tokens); });
  }
  if (plan.levels.size() < 2) return;
  for (const int rows : plan.mixed_rows) {
    report->mixed.push_back({.levels = MixedLevels(plan.levels, rows)});
    MixedRow& row = report->mixed.back();
    const auto add = [&](Timing* result, std::vector<int> levels, EngineTimer::Mix mix) {
      results->push_back(result);
      jobs->push_back([=] {
        return timer->Decode(
            {.levels = levels, .context = plan.context, .steps = plan.tokens, .mix = mix});
      });
    };
    add(&row.chosen, row.levels, EngineTimer::Mix::kEngineChooses);
    add(&row.as_asked, row.levels, EngineTimer::Mix::kAsAsked);
    add(&row.pass_per_level, row.levels, EngineTimer::Mix::kPassPerLevel);
    add(&row.raised, std::vector<int>(rows, row.levels.back()), EngineTimer::Mix::kAsAsked);
  }
}

using Texts = std::vector<std::vector<int32_t>>;

// The lines of a file as the daemon tokenises them.
absl::StatusOr<Texts> ReadTexts(const std::string& path, const Engine& engine) {
  NESTOR_ASSIGN_OR_RETURN(const std::string content, ReadFileOrStdin(path));
  NESTOR_RETURN_IF_ERROR(CheckUtf8(path, content));
  const std::vector<std::string> lines = NonEmptyLines(content);
  if (lines.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": has no line of text"));
  Texts texts;
  for (const std::string& line : lines) {
    NESTOR_ASSIGN_OR_RETURN(std::vector<int32_t> tokens,
                            engine.tokenizer().Encode(line, /*adds_special_tokens=*/true));
    if (static_cast<int64_t>(tokens.size()) > engine.max_sequence_length()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": text ", texts.size() + 1, " has ",
                                                     tokens.size(), " tokens; the model takes ",
                                                     engine.max_sequence_length()));
    }
    texts.push_back(std::move(tokens));
  }
  return texts;
}

Texts RandomTexts(const BenchPlan& plan, EngineTimer* timer) {
  const auto largest_batch =
      static_cast<size_t>(*std::max_element(plan.batches.begin(), plan.batches.end()));
  Texts texts(std::max(kRandomTexts, largest_batch));
  for (std::vector<int32_t>& text : texts) text = timer->RandomTokens(plan.prompt_tokens);
  return texts;
}

// `texts` is borrowed by the jobs.
void AddEncoderJobs(const BenchPlan& plan, const Texts& texts, EngineTimer* timer,
                    BenchReport* report, std::vector<Job>* jobs, std::vector<Timing*>* results) {
  report->num_texts = texts.size();
  report->embed.reserve(plan.levels.size() * plan.batches.size());
  for (const int batch : plan.batches) {
    for (const int level : plan.levels) {
      report->embed.push_back({.level = level, .batch = batch, .measured = {}});
      results->push_back(&report->embed.back().measured);
      jobs->push_back([=, &texts] { return timer->Embed(level, texts, batch); });
    }
  }
}

absl::StatusOr<std::optional<SpeculationBenchOptions>> SpeculationOptions(const BenchFlags& flags,
                                                                          const BenchPlan& plan) {
  if (flags.speculate != flags.prompts.has_value()) {
    return UsageError("--speculate and --prompts go together");
  }
  if (!flags.speculate) return std::nullopt;
  NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFileOrStdin(*flags.prompts));
  NESTOR_RETURN_IF_ERROR(CheckUtf8("--prompts", text));
  return SpeculationBenchOptions{.levels = plan.levels,
                                 .prompts = NonEmptyLines(text),
                                 .tokens = plan.tokens,
                                 .rounds = plan.rounds};
}

absl::StatusOr<BenchReport> RunAll(const std::string& directory, const BenchFlags& flags) {
  std::optional<CpuInstructionSet> instruction_set;
  if (flags.instruction_set.has_value()) {
    instruction_set = InstructionSetNamed(*flags.instruction_set);
    if (!instruction_set.has_value()) {
      return UsageError(absl::StrCat("--instruction-set: ", *flags.instruction_set,
                                     ", expected portable, avx2, avx512 or avx512_bf16"));
    }
  }
  NESTOR_ASSIGN_OR_RETURN(const KvCacheType kv_cache_type, ParseKvCacheType(flags.kv_cache_type));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model, NestedModel::Open(directory));
  const absl::Status added = AddInterpolatedLevels(flags.extra_costs, model.get());
  if (!added.ok()) return UsageError(absl::StrCat("--extra-cost: ", added.message()));
  NESTOR_ASSIGN_OR_RETURN(const BenchPlan plan, MakePlan(flags, *model));
  NESTOR_ASSIGN_OR_RETURN(const std::optional<SpeculationBenchOptions> speculation,
                          SpeculationOptions(flags, plan));
  if (speculation && model->spec().is_encoder()) return UsageError("--speculate: an encoder");
  BenchReport report;
  report.model = directory;
  report.cpu = DescribeCpu(instruction_set.value_or(BestInstructionSet()));
  report.is_encoder = model->spec().is_encoder();
  report.plan = plan;
  const EngineOptions options = OptionsFor(plan, model->spec());
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                          MakeCpuBackend({.num_threads = plan.threads,
                                          .pin_threads = plan.pin_threads,
                                          .instruction_set = instruction_set,
                                          .kv_cache_type = kv_cache_type}));
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                          Engine::Create(std::move(model), std::move(backend), options));
  if (speculation) {
    NESTOR_ASSIGN_OR_RETURN(report.speculation, MeasureSpeculation(engine.get(), *speculation));
    return report;
  }
  EngineTimer timer(engine.get());
  std::vector<Job> jobs;
  std::vector<Timing*> results;
  Timing reading;
  Timing multiplying;
  AddMachineJobs(plan.threads, instruction_set.value_or(BestInstructionSet()), &reading,
                 &multiplying, &jobs, &results);
  Texts texts;
  if (report.is_encoder) {
    if (flags.texts) {
      NESTOR_ASSIGN_OR_RETURN(texts, ReadTexts(*flags.texts, *engine));
    } else {
      texts = RandomTexts(plan, &timer);
    }
    AddEncoderJobs(plan, texts, &timer, &report, &jobs, &results);
  } else {
    AddDecoderJobs(plan, &timer, &report, &jobs, &results);
  }
  Progress progress("bench", static_cast<int64_t>(jobs.size()) * (plan.rounds + 1));
  NESTOR_ASSIGN_OR_RETURN(const std::vector<Timing> medians,
                          MedianOfRounds(jobs, plan.rounds, &progress));
  for (size_t i = 0; i < medians.size(); ++i) *results[i] = medians[i];
  report.read_gbps = reading.weight_gbps();
  report.gemm_gflops = multiplying.gflops();
  return report;
}

double SentencesPerSecond(const BenchReport& report, const EmbedRow& row) {
  return static_cast<double>(report.num_texts) / row.measured.seconds;
}

// `row`, with what was executed in it.
nlohmann::json WithWork(nlohmann::json row, const Timing& measured) {
  row["seconds"] = measured.seconds;
  row["flops"] = measured.flops;
  row["weight_bytes"] = measured.weight_bytes;
  return row;
}

nlohmann::json ToJson(const BenchReport& report) {
  nlohmann::json decode = nlohmann::json::array();
  for (const DecodeRow& row : report.decode) {
    decode.push_back(WithWork({{"level", row.level},
                               {"rows", row.rows},
                               {"tokens_per_second", row.measured.tokens_per_second()},
                               {"weight_gbps", row.measured.weight_gbps()}},
                              row.measured));
  }
  nlohmann::json prefill = nlohmann::json::array();
  for (const PromptRow& row : report.prefill) {
    prefill.push_back(WithWork({{"level", row.level},
                                {"tokens", row.measured.tokens},
                                {"tokens_per_second", row.measured.tokens_per_second()}},
                               row.measured));
  }
  nlohmann::json embed = nlohmann::json::array();
  for (const EmbedRow& row : report.embed) {
    embed.push_back(WithWork({{"level", row.level},
                              {"batch", row.batch},
                              {"sentences", report.num_texts},
                              {"tokens", row.measured.tokens},
                              {"sentences_per_second", SentencesPerSecond(report, row)},
                              {"tokens_per_second", row.measured.tokens_per_second()}},
                             row.measured));
  }
  nlohmann::json mixed = nlohmann::json::array();
  for (const MixedRow& row : report.mixed) {
    mixed.push_back(WithWork({{"levels", row.levels},
                              {"rows", row.levels.size()},
                              {"tokens_per_second", row.chosen.tokens_per_second()},
                              {"rows_by_executed_level", row.chosen.rows_by_level},
                              {"seconds_as_asked", row.as_asked.seconds},
                              {"seconds_pass_per_level", row.pass_per_level.seconds},
                              {"seconds_raised", row.raised.seconds}},
                             row.chosen));
  }
  nlohmann::json speculation;
  if (report.speculation) speculation = ToJson(*report.speculation);
  return {{"model", report.model},          {"cpu", report.cpu},
          {"threads", report.plan.threads}, {"pin_threads", report.plan.pin_threads},
          {"read_gbps", report.read_gbps},  {"gemm_gflops", report.gemm_gflops},
          {"rounds", report.plan.rounds},   {"decode", std::move(decode)},
          {"prefill", std::move(prefill)},  {"embed", std::move(embed)},
          {"mixed", std::move(mixed)},      {"speculation", std::move(speculation)}};
}

// "0,3,6": each level once, in ascending order.
std::string Distinct(std::vector<int> levels) {
  std::sort(levels.begin(), levels.end());
  levels.erase(std::unique(levels.begin(), levels.end()), levels.end());
  return absl::StrJoin(levels, ",");
}

// "level 3: 25 %, level 6: 75 %", of rows.
std::string ExecutedLevels(const Timing& measured) {
  std::vector<std::string> shares;
  for (const auto& [level, rows] : measured.rows_by_level) {
    shares.push_back(
        absl::StrFormat("level %d: %.0f %%", level,
                        100 * static_cast<double>(rows) / static_cast<double>(measured.tokens)));
  }
  return absl::StrJoin(shares, ", ");
}

void PrintDecoderTables(const BenchReport& report) {
  TextTable decode({"decode: level", "rows", "tokens/s", "weight GB/s", "of read bandwidth"});
  for (const DecodeRow& row : report.decode) {
    const double gbps = row.measured.weight_gbps();
    decode.AddRow({absl::StrCat(row.level), absl::StrCat(row.rows),
                   absl::StrFormat("%.1f", row.measured.tokens_per_second()),
                   absl::StrFormat("%.1f", gbps),
                   absl::StrFormat("%.0f %%", 100 * gbps / report.read_gbps)});
  }
  TextTable prefill({"prefill: level", "tokens", "tokens/s", "GFLOP/s", "of GEMM rate"});
  for (const PromptRow& row : report.prefill) {
    const double gflops = row.measured.gflops();
    prefill.AddRow({absl::StrCat(row.level), absl::StrCat(row.measured.tokens),
                    absl::StrFormat("%.1f", row.measured.tokens_per_second()),
                    absl::StrFormat("%.1f", gflops),
                    absl::StrFormat("%.0f %%", 100 * gflops / report.gemm_gflops)});
  }
  absl::PrintF("%s\n%s", decode.Render(), prefill.Render());
  if (report.mixed.empty()) return;
  TextTable mixed({"mixed: levels", "tokens/s as the engine chose", "as asked", "pass per level",
                   "all raised", "time of the best of these", "executed"});
  for (const MixedRow& row : report.mixed) {
    mixed.AddRow({absl::StrCat(row.levels.size(), " rows of ", Distinct(row.levels)),
                  absl::StrFormat("%.1f", row.chosen.tokens_per_second()),
                  absl::StrFormat("%.1f", row.as_asked.tokens_per_second()),
                  absl::StrFormat("%.1f", row.pass_per_level.tokens_per_second()),
                  absl::StrFormat("%.1f", row.raised.tokens_per_second()),
                  absl::StrFormat("%.2f", row.chosen_against_best()), ExecutedLevels(row.chosen)});
  }
  absl::PrintF("\n%s", mixed.Render());
}

void PrintTables(const BenchReport& report) {
  if (report.speculation) {
    absl::PrintF("%s, %d threads; medians of %d rounds\n\n%s", report.cpu, report.plan.threads,
                 report.plan.rounds, Render(*report.speculation));
    return;
  }
  absl::PrintF("%s, %d threads, reads %.1f GB/s, multiplies %.0f GFLOP/s; medians of %d rounds\n\n",
               report.cpu, report.plan.threads, report.read_gbps, report.gemm_gflops,
               report.plan.rounds);
  if (!report.is_encoder) return PrintDecoderTables(report);
  TextTable embed({"embed: level", "batch", "sentences/s", "tokens/s", "GFLOP/s", "of GEMM rate"});
  for (const EmbedRow& row : report.embed) {
    const double gflops = row.measured.gflops();
    embed.AddRow({absl::StrCat(row.level), absl::StrCat(row.batch),
                  absl::StrFormat("%.1f", SentencesPerSecond(report, row)),
                  absl::StrFormat("%.0f", row.measured.tokens_per_second()),
                  absl::StrFormat("%.1f", gflops),
                  absl::StrFormat("%.0f %%", 100 * gflops / report.gemm_gflops)});
  }
  absl::PrintF("%d sentences, %d tokens\n\n%s", report.num_texts,
               report.embed.front().measured.tokens, embed.Render());
}

}  // namespace

absl::Status RunBench(const std::vector<std::string>& arguments) {
  BenchFlags values;
  Flags flags(
      "nestor bench MODEL_DIR [flags]\n\n"
      "Measures what this machine reads from memory and multiplies, then the speed of every\n"
      "level: decoding and prefill, or embedding for an encoder. Levels take turns, and medians\n"
      "of several rounds are printed, since machines are noisy. Prompts are random tokens, and so\n"
      "are an encoder's sentences unless --texts names a file. Needs no daemon.",
      "nestor bench models/smollm2-135m-instruct.nested --threads 2 --rows 1,4\n"
      "nestor bench models/all-minilm-l6-v2.nested --texts sentences.txt --batch 1,32");
  Declare(&flags, &values);
  NESTOR_ASSIGN_OR_RETURN(const std::vector<std::string> positional, flags.Parse(arguments));
  if (positional.size() != 1) {
    return UsageError(absl::StrCat("expected one model directory; got ", positional.size()));
  }
  NESTOR_ASSIGN_OR_RETURN(const BenchReport report, RunAll(positional[0], values));
  if (values.json) {
    absl::PrintF("%s\n", ToJson(report).dump(2));
  } else {
    PrintTables(report);
  }
  return absl::OkStatus();
}

}  // namespace nestor
