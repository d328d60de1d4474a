#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nestor {

class DecoderRun;

// Turns text into token ids and back as Hugging Face's tokenizers does, from `tokenizer.json`:
// byte-level BPE, sentencepiece-style BPE and WordPiece, with their normalisers, pre-tokenisers,
// post-processors and added tokens.
//
// Immutable after loading, so safe to share between threads.
class Tokenizer {
 public:
  // `path` is a tokenizer.json. INVALID_ARGUMENT names the file, the field and what is not
  // supported; NOT_FOUND where there is no such file.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path);
  ~Tokenizer();

  // Special tokens written in `text` are recognised. `adds_special_tokens`: what the
  // post-processor adds ([CLS], [SEP], BOS). INVALID_ARGUMENT where `text` is not UTF-8.
  absl::StatusOr<std::vector<int32_t>> Encode(const std::string& text,
                                              bool adds_special_tokens) const;
  // The text of `ids`, special tokens left out where asked. Ids out of range give U+FFFD.
  std::string Decode(std::span<const int32_t> ids, bool skips_special_tokens) const;

  // Ids in [0, size()).
  int32_t size() const;
  std::optional<int32_t> IdOf(std::string_view token) const;
  bool IsSpecial(int32_t id) const;

 private:
  struct State;
  friend class StreamingDecoder;
  explicit Tokenizer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Decodes one generation token by token and never emits half a character. The concatenation of
// what Push and Flush return is Decode of all ids (skipping special tokens): text that later tokens
// could still change is held back. The cost of a token does not grow with the text before it.
//
// Not thread-safe.
class StreamingDecoder {
 public:
  // `tokenizer` is borrowed and must outlive this.
  explicit StreamingDecoder(const Tokenizer* tokenizer);
  StreamingDecoder(StreamingDecoder&& other) noexcept;
  StreamingDecoder& operator=(StreamingDecoder&& other) noexcept;
  ~StreamingDecoder();
  // The text that `id` completes; empty while a character is still incomplete.
  std::string Push(int32_t id);
  // What is left, incomplete bytes replaced by U+FFFD. The next Push starts another generation.
  std::string Flush();

 private:
  const Tokenizer* tokenizer_;
  std::unique_ptr<DecoderRun> run_;
};

}  // namespace nestor
