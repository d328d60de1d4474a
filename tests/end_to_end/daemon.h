#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/end_to_end/program.h"

namespace nestor {

// Writes a text of made-up sentences, one a line, about `num_bytes` long.
absl::Status WriteProse(const std::string& path, size_t num_bytes);

// A running `nestord` on free loopback ports.
class Daemon {
 public:
  // Serves `model`; `settings` are "group.key=value". Returns once it is ready; INTERNAL, with its
  // output, where it ends or is not ready in time.
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const std::string& model,
                                                       const std::vector<std::string>& settings);

  const std::string& address() const { return address_; }
  int metrics_port() const { return metrics_port_; }
  Program& program() { return *program_; }

  // `nestor` with --server set.
  std::vector<std::string> Arguments(std::vector<std::string> arguments) const;
  ProgramResult Run(const std::vector<std::string>& arguments) const;
  // The value of the sample whose line starts with `name` and a space, labels included in it.
  absl::StatusOr<double> Metric(const std::string& name) const;

 private:
  Daemon() = default;

  TemporaryDirectory directory_;
  std::string address_;
  int metrics_port_ = 0;
  std::unique_ptr<Program> program_;
};

}  // namespace nestor
