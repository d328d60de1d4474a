#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/probe/timing.h"

namespace nestor::probe {

// One measured fact: a JSON object under construction. Keys are in the order they were set.
class Record {
 public:
  // `question`: which part of the probe; `form`: what was measured there.
  Record(const std::string& question, const std::string& form);

  Record& Set(const std::string& key, const std::string& value);
  Record& Set(const std::string& key, double value);
  Record& Set(const std::string& key, int64_t value);
  Record& Set(const std::string& key, int value) { return Set(key, static_cast<int64_t>(value)); }
  // `first`, `second`, `invocations`: seconds of one invocation.
  Record& Set(const Timing& timing);
  // ‖out − ref‖ / ‖ref‖ and the bar that it must not pass. A NaN passes no bar.
  Record& SetError(double error, double bar);

  bool passes() const { return passes_; }
  std::string Json() const;

 private:
  std::vector<std::pair<std::string, std::string>> fields_;  // key, JSON value
  bool passes_ = true;
};

// Collects records, prints each as it comes, and writes one JSON file. Not thread-safe.
class Report {
 public:
  void SetDevice(const Record& device) { device_ = device.Json(); }
  void Add(const Record& record);
  // What was asked for but could not run on this device or library, and why.
  void AddSkipped(const std::string& question, const std::string& form, const std::string& reason);

  int num_failed() const { return num_failed_; }
  int num_records() const { return static_cast<int>(records_.size()); }
  // False when the file cannot be written.
  bool Write(const std::string& path) const;

 private:
  std::string device_ = "null";
  std::vector<std::string> records_;
  std::vector<std::string> skipped_;
  int num_failed_ = 0;
};

}  // namespace nestor::probe
