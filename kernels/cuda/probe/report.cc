#include "kernels/cuda/probe/report.h"

#include <cmath>
#include <cstdio>
#include <fstream>

namespace nestor::probe {
namespace {

std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + '"';
}

std::string Number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

void WriteList(std::ofstream& file, const std::vector<std::string>& objects) {
  for (size_t i = 0; i < objects.size(); ++i) file << (i == 0 ? "\n  " : ",\n  ") << objects[i];
}

}  // namespace

Record::Record(const std::string& question, const std::string& form) {
  Set("question", question);
  Set("form", form);
}

Record& Record::Set(const std::string& key, const std::string& value) {
  fields_.emplace_back(key, Quoted(value));
  return *this;
}

Record& Record::Set(const std::string& key, double value) {
  fields_.emplace_back(key, Number(value));
  return *this;
}

Record& Record::Set(const std::string& key, int64_t value) {
  fields_.emplace_back(key, std::to_string(value));
  return *this;
}

Record& Record::Set(const Timing& timing) {
  return Set("first", timing.first)
      .Set("second", timing.second)
      .Set("invocations", timing.invocations);
}

Record& Record::SetError(double error, double bar) {
  passes_ = error <= bar;
  return Set("error", error).Set("bar", bar).Set("check", passes_ ? "passed" : "failed");
}

std::string Record::Json() const {
  std::string out = "{";
  for (const auto& [key, value] : fields_) {
    if (out.size() > 1) out += ", ";
    out += Quoted(key) + ": " + value;
  }
  return out + "}";
}

void Report::Add(const Record& record) {
  records_.push_back(record.Json());
  if (!record.passes()) ++num_failed_;
  std::printf("%s\n", records_.back().c_str());
  std::fflush(stdout);
}

void Report::AddSkipped(const std::string& question, const std::string& form,
                        const std::string& reason) {
  skipped_.push_back(Record(question, form).Set("reason", reason).Json());
  std::printf("skipped %s\n", skipped_.back().c_str());
}

bool Report::Write(const std::string& path) const {
  std::ofstream file(path);
  file << "{\"device\": " << device_ << ",\n\"records\": [";
  WriteList(file, records_);
  file << "],\n\"skipped\": [";
  WriteList(file, skipped_);
  file << "]}\n";
  file.close();
  return file.good();
}

}  // namespace nestor::probe
