#include <semaphore.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/json_log.h"
#include "base/status_macros.h"
#include "engine/engine.h"
#include "engine/interpolate.h"
#include "engine/nested_model.h"
#include "kernels/cpu/cpu_backend.h"
#include "server/config/server_config.h"
#include "server/server.h"

namespace nestor {
namespace {

constexpr char kHelp[] =
    R"(nestord [--config FILE] [--model DIR] [--listen ADDRESS:PORT] [--port-file FILE]
        [--set GROUP.KEY=VALUE]...

  --config FILE         every key, its default and its unit: config/nestord.yaml
  --model DIR           an artifact of `nestor compress`, or a Hugging Face directory
  --listen ADDR:PORT    gRPC; port 0 takes a free one
  --port-file FILE      the port is written here once requests are served
  --set GROUP.KEY=VALUE one key of the configuration; may be given several times

Example: nestord --model models/smollm2-135m-instruct.nested --listen 127.0.0.1:50051
)";

struct Arguments {
  bool wants_help = false;
  std::string config_path;
  std::string port_file;
  std::vector<std::pair<std::string, std::string>> overrides;
};

absl::Status AddOverride(const std::string& text, Arguments* arguments) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("--set: must be GROUP.KEY=VALUE; was '", text, "'"));
  }
  arguments->overrides.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  return absl::OkStatus();
}

absl::Status AddFlag(const std::string& name, const std::string& value, Arguments* arguments) {
  if (name == "--config") {
    arguments->config_path = value;
  } else if (name == "--port-file") {
    arguments->port_file = value;
  } else if (name == "--model") {
    arguments->overrides.emplace_back("model.directory", value);
  } else if (name == "--listen") {
    arguments->overrides.emplace_back("server.listen", value);
  } else if (name == "--set") {
    return AddOverride(value, arguments);
  } else {
    return absl::InvalidArgumentError(absl::StrCat("unknown flag ", name, "; see --help"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Arguments> ParseArguments(const std::vector<std::string>& words) {
  Arguments arguments;
  for (size_t i = 0; i < words.size(); ++i) {
    std::string name = words[i];
    if (name == "--help" || name == "-h") {
      arguments.wants_help = true;
      continue;
    }
    // --name=value or --name value; --set's value has a '=' of its own.
    const size_t equals = name.find('=');
    std::string value;
    if (equals != std::string::npos) {
      value = name.substr(equals + 1);
      name.resize(equals);
    } else if (i + 1 < words.size()) {
      value = words[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat(name, ": needs a value; see --help"));
    }
    NESTOR_RETURN_IF_ERROR(AddFlag(name, value, &arguments));
  }
  return arguments;
}

absl::StatusOr<ServerConfig> ReadConfig(const Arguments& arguments) {
  ServerConfig config;
  if (!arguments.config_path.empty()) {
    NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(arguments.config_path));
    NESTOR_ASSIGN_OR_RETURN(config, ParseConfig(text, arguments.config_path));
  }
  NESTOR_RETURN_IF_ERROR(OverrideConfig(arguments.overrides, &config));
  if (config.model_directory.empty()) {
    return absl::InvalidArgumentError("model.directory: must be given (or --model DIR)");
  }
  return config;
}

// A part of the memory that leaves room for the weights and for others on the machine.
int64_t KvCacheBytes(const ServerConfig& config) {
  return config.engine_kv_cache_bytes > 0 ? config.engine_kv_cache_bytes
                                          : AvailableMemoryBytes() / 4;
}

// Before anything is laid out for them.
absl::Status AddExtraLevels(const ServerConfig& config, NestedModel* model) {
  const absl::Status added = AddInterpolatedLevels(config.engine_extra_costs, model);
  if (added.ok()) return added;
  return absl::Status(added.code(), absl::StrCat("engine.extra_costs: ", added.message()));
}

absl::StatusOr<std::unique_ptr<Engine>> LoadEngine(const ServerConfig& config) {
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<NestedModel> model,
                          NestedModel::Open(config.model_directory));
  if (model->spec().is_classifier()) {
    return absl::UnimplementedError(
        absl::StrCat(config.model_directory, ": ", model->spec().architecture,
                     " has labels, which no RPC serves; nestor evaluate --labels measures them"));
  }
  NESTOR_RETURN_IF_ERROR(AddExtraLevels(config, model.get()));
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                          MakeCpuBackend({.num_threads = static_cast<int>(config.device_threads),
                                          .pin_threads = config.device_pin_threads,
                                          .kv_cache_type = config.engine_kv_cache_type == "fp32"
                                                               ? KvCacheType::kFloat32
                                                               : KvCacheType::kBfloat16}));
  return Engine::Create(std::move(model), std::move(backend),
                        {.max_step_rows = config.engine_max_step_rows,
                         .kv_cache_bytes = KvCacheBytes(config),
                         .max_sequences = config.engine_max_sequences,
                         .page_size = config.engine_page_size});
}

// What will be slow, before it is.
void WarnOfSlowDevice(const ServerConfig& config) {
  if (BestInstructionSet() == CpuInstructionSet::kPortable) {
    LogEvent(LogSeverity::kWarning, "slow_device",
             {{"reason", "the CPU has no AVX2: portable kernels run, much slower"}});
  }
  if (config.device_threads > AvailableCpus()) {
    LogEvent(LogSeverity::kWarning, "slow_device",
             {{"reason", absl::StrCat("device.threads: ", config.device_threads,
                                      " threads for the ", AvailableCpus(),
                                      " CPUs that this process may use wait for each other")}});
  }
}

void AnnounceReady(const Server& server) {
  nlohmann::json levels = nlohmann::json::array();
  for (const ServedLevel& level : server.model().levels) {
    levels.push_back({{"form", level.form},
                      {"relative_cost", level.relative_cost},
                      {"quality", level.quality},
                      {"interpolated", level.is_interpolated},
                      {"tokens_per_second", level.tokens_per_second}});
  }
  LogEvent(LogSeverity::kInfo, "serving",
           {{"model", server.model().name},
            {"port", server.port()},
            {"metrics_port", server.metrics_port()},
            {"levels", levels}});
  std::cout << "nestord: serving " << server.model().name << " on port " << server.port()
            << std::endl;
}

// What a signal handler may touch. Blocking signals and sigwait would not do: OpenBLAS starts a
// thread as it is loaded, before main, which blocks nothing and would take the signal's default.
sem_t stop_requested;

void RequestStop(int /*signal*/) { sem_post(&stop_requested); }

void HandleStopSignals() {
  sem_init(&stop_requested, /*pshared=*/0, /*value=*/0);
  struct sigaction action = {};
  action.sa_handler = RequestStop;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
}

void WaitForStop() {
  while (sem_wait(&stop_requested) != 0 && errno == EINTR) {
  }
}

absl::Status Serve(const Arguments& arguments) {
  NESTOR_ASSIGN_OR_RETURN(const ServerConfig config, ReadConfig(arguments));
  LogEvent(LogSeverity::kInfo, "configuration", ToJson(config));
  WarnOfSlowDevice(config);
  NESTOR_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, LoadEngine(config));
  ServedModel model = DescribeModel(*engine, DescribeCpu(BestInstructionSet()));
  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<Server> server,
                          Server::Listen(config, std::move(engine), std::move(model)));
  NESTOR_RETURN_IF_ERROR(server->WarmUpAndServe());
  if (!arguments.port_file.empty()) {
    NESTOR_RETURN_IF_ERROR(
        WriteFileAtomically(arguments.port_file, absl::StrCat(server->port(), "\n")));
  }
  AnnounceReady(*server);
  WaitForStop();
  server->Drain();
  return absl::OkStatus();
}

int Main(const std::vector<std::string>& words) {
  HandleStopSignals();
  const absl::StatusOr<Arguments> arguments = ParseArguments(words);
  if (arguments.ok() && arguments->wants_help) {
    std::cout << kHelp;
    return 0;
  }
  const absl::Status status = arguments.ok() ? Serve(*arguments) : arguments.status();
  if (status.ok()) return 0;
  std::cerr << "nestord: " << status.message() << "\n";
  return 1;
}

}  // namespace
}  // namespace nestor

int main(int argc, char** argv) {
  return nestor::Main(std::vector<std::string>(argv + 1, argv + argc));
}
