#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "engine/tokenizer_json.h"
#include "engine/tokenizer_pattern.h"

namespace nestor {

// One step from tokens to text, fed token by token: what it emits for a prefix of the tokens never
// changes. Holds the state of one text; not thread-safe.
class DecoderStage {
 public:
  // A token may arrive in parts; the last part has `ends_token`.
  using Emit = absl::FunctionRef<void(std::string_view part, bool ends_token)>;

  virtual ~DecoderStage() = default;
  virtual void Push(std::string_view part, bool ends_token, Emit emit) = 0;
  // After the last token: emits what was held back.
  virtual void Finish(Emit /*emit*/) {}
};

// The stages of a decoder in the middle of one text. Not thread-safe.
class DecoderRun {
 public:
  explicit DecoderRun(std::vector<std::unique_ptr<DecoderStage>> stages);
  // Appends to `text` what `token` completes. REQUIRES: valid UTF-8.
  void Push(std::string_view token, std::string* text);
  void Finish(std::string* text);

 private:
  void Feed(size_t stage, std::string_view part, bool ends_token, std::string* text);
  std::vector<std::unique_ptr<DecoderStage>> stages_;
};

// The `decoder` of a tokenizer.json.
//
// Immutable, so safe to share between threads.
class TokenDecoder {
 public:
  // Null stands for tokens with spaces between. INVALID_ARGUMENT names the field of a type that is
  // not supported.
  static absl::StatusOr<TokenDecoder> Parse(const JsonField& field);
  // This must outlive what it returns.
  std::unique_ptr<DecoderRun> Start() const;

 private:
  absl::Status ParseStages(const JsonField& field);
  absl::Status ParseReplace(const JsonField& field);
  absl::Status ParseStrip(const JsonField& field);

  std::vector<std::unique_ptr<TextPattern>> patterns_;  // that stages point to
  std::vector<std::function<std::unique_ptr<DecoderStage>()>> stages_;
};

}  // namespace nestor
