#include "engine/tokenizer_decoder.h"

#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"
#include "engine/pre_tokenizer_bytes.h"
#include "engine/unicode.h"

namespace nestor {
namespace {

// A stage that works on whole tokens.
class TokenStage : public DecoderStage {
 public:
  void Push(std::string_view part, bool ends_token, Emit emit) final {
    if (ends_token && parts_.empty()) {
      PushToken(part, emit);
      return;
    }
    parts_ += part;
    if (!ends_token) return;
    PushToken(parts_, emit);
    parts_.clear();
  }

 private:
  virtual void PushToken(std::string_view token, Emit emit) = 0;
  std::string parts_;
};

// Joins bytes to characters; its output is one token.
class ByteLevelStage : public TokenStage {
 public:
  void Finish(Emit emit) override { EmitCharacters(/*is_last=*/true, emit); }

 private:
  void PushToken(std::string_view token, Emit emit) override {
    if (!AppendBytesOfByteLevelText(token, &bytes_)) bytes_ += token;
    EmitCharacters(/*is_last=*/false, emit);
  }

  void EmitCharacters(bool is_last, Emit emit) {
    text_.clear();
    bytes_.erase(0, AppendLossyUtf8(bytes_, is_last, &text_));
    emit(text_, is_last);
  }

  std::string bytes_;  // of a character that is not complete
  std::string text_;   // what is emitted; kept so that tokens do not allocate
};

class FuseStage : public DecoderStage {
 public:
  void Push(std::string_view part, bool /*ends_token*/, Emit emit) override { emit(part, false); }
  void Finish(Emit emit) override { emit("", true); }
};

class SpaceBetweenStage : public TokenStage {
  void PushToken(std::string_view token, Emit emit) override {
    if (!is_first_) emit(" ", true);
    is_first_ = false;
    emit(token, true);
  }
  bool is_first_ = true;
};

class WordPieceStage : public TokenStage {
 public:
  WordPieceStage(std::string prefix, bool cleans_up)
      : prefix_(std::move(prefix)), cleans_up_(cleans_up) {}

 private:
  void PushToken(std::string_view token, Emit emit) override {
    std::string text;
    if (is_first_)
      text = token;
    else if (token.starts_with(prefix_))
      text = token.substr(prefix_.size());
    else
      text = absl::StrCat(" ", absl::string_view(token.data(), token.size()));
    is_first_ = false;
    if (cleans_up_) CleanUp(&text);
    emit(text, true);
  }

  // In this order, since one replacement may make another's pattern.
  static void CleanUp(std::string* text) {
    constexpr std::pair<const char*, const char*> kReplacements[] = {
        {" .", "."},   {" ?", "?"},     {" !", "!"},    {" ,", ","},
        {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},  {" do not", " don't"},
        {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
    for (const auto& [from, to] : kReplacements) absl::StrReplaceAll({{from, to}}, text);
  }

  const std::string prefix_;
  const bool cleans_up_;
  bool is_first_ = true;
};

// Marks become spaces; those of the first token go where encoding prepended one.
class MetaspaceStage : public DecoderStage {
 public:
  MetaspaceStage(std::string mark, bool drops_first)
      : mark_(std::move(mark)), drops_marks_(drops_first) {}

  void Push(std::string_view part, bool ends_token, Emit emit) override {
    const std::string text = absl::StrReplaceAll(absl::string_view(part.data(), part.size()),
                                                 {{mark_, drops_marks_ ? "" : " "}});
    if (ends_token) drops_marks_ = false;
    emit(text, ends_token);
  }

 private:
  const std::string mark_;  // one character, so it never spans parts
  bool drops_marks_;
};

class ReplaceStage : public TokenStage {
 public:
  ReplaceStage(const TextPattern* pattern, std::string content)
      : pattern_(pattern), content_(std::move(content)) {}

 private:
  void PushToken(std::string_view token, Emit emit) override {
    // A token on which the expression gives up stays as it is: decoding cannot fail.
    const absl::StatusOr<std::string> replaced = pattern_->ReplaceAll(token, content_);
    emit(replaced.ok() ? std::string_view(*replaced) : token, true);
  }

  const TextPattern* const pattern_;
  const std::string content_;
};

// Runs of tokens "<0x0A>" become the characters of their bytes. A run that is not UTF-8 becomes
// U+FFFD throughout, so a run is only known when it ends.
class ByteFallbackStage : public TokenStage {
 public:
  void Finish(Emit emit) override { EmitRun(emit); }

 private:
  void PushToken(std::string_view token, Emit emit) override {
    const std::optional<char> byte = ByteOf(token);
    if (byte.has_value()) {
      run_ += *byte;
      return;
    }
    EmitRun(emit);
    emit(token, true);
  }

  void EmitRun(Emit emit) {
    if (run_.empty()) return;
    if (IsValidUtf8(run_)) {
      emit(run_, true);
    } else {
      for (size_t i = 0; i < run_.size(); ++i) emit("\uFFFD", true);
    }
    run_.clear();
  }

  static std::optional<char> ByteOf(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
    int value = 0;
    for (const char digit : token.substr(3, 2)) {
      const std::string_view digits = "0123456789abcdef";
      const size_t found = digits.find(absl::ascii_tolower(digit));
      if (found == std::string_view::npos) return std::nullopt;
      value = value * 16 + static_cast<int>(found);
    }
    return static_cast<char>(value);
  }

  std::string run_;
};

// Takes up to `num_start` of `content` from the start of every token, `num_stop` from its end.
class StripStage : public DecoderStage {
 public:
  struct Options {
    std::string content;  // one character
    int64_t num_start;
    int64_t num_stop;
  };
  explicit StripStage(Options options) : options_(std::move(options)) {}

  void Push(std::string_view part, bool ends_token, Emit emit) override {
    while (num_stripped_ < options_.num_start && part.starts_with(options_.content)) {
      part.remove_prefix(options_.content.size());
      ++num_stripped_;
    }
    if (!part.empty()) num_stripped_ = options_.num_start;
    // Whether the end of this part is the token's is not known yet.
    held_ += part;
    size_t num_emitted = held_.size();
    for (int64_t i = 0; i < options_.num_stop; ++i) {
      const std::string_view kept = std::string_view(held_).substr(0, num_emitted);
      if (!kept.ends_with(options_.content)) break;
      num_emitted -= options_.content.size();
    }
    emit(std::string_view(held_).substr(0, num_emitted), ends_token);
    held_.erase(0, ends_token ? held_.size() : num_emitted);
    if (ends_token) num_stripped_ = 0;
  }

 private:
  const Options options_;
  int64_t num_stripped_ = 0;  // from the start of this token
  std::string held_;
};

// The suffix that ends a word becomes a space, but not at the end of the text.
class WordSuffixStage : public TokenStage {
 public:
  explicit WordSuffixStage(std::string suffix) : suffix_(std::move(suffix)) {}
  void Finish(Emit emit) override {
    if (last_.has_value()) emit(absl::StrReplaceAll(*last_, {{suffix_, ""}}), true);
    last_.reset();
  }

 private:
  void PushToken(std::string_view token, Emit emit) override {
    if (last_.has_value()) emit(absl::StrReplaceAll(*last_, {{suffix_, " "}}), true);
    last_ = token;
  }

  const std::string suffix_;
  std::optional<std::string> last_;
};

absl::Status RequireOneCharacter(const JsonField& field, const std::string& value) {
  if (CountCodePoints(value) == 1) return absl::OkStatus();
  return field.Error(absl::StrCat("must be one character; was \"", value, "\""));
}

}  // namespace

DecoderRun::DecoderRun(std::vector<std::unique_ptr<DecoderStage>> stages)
    : stages_(std::move(stages)) {}

void DecoderRun::Feed(size_t stage, std::string_view part, bool ends_token, std::string* text) {
  if (stage == stages_.size()) {
    *text += part;
    return;
  }
  stages_[stage]->Push(part, ends_token, [&](std::string_view emitted, bool ends) {
    Feed(stage + 1, emitted, ends, text);
  });
}

void DecoderRun::Push(std::string_view token, std::string* text) {
  Feed(0, token, /*ends_token=*/true, text);
}

void DecoderRun::Finish(std::string* text) {
  for (size_t stage = 0; stage < stages_.size(); ++stage) {
    stages_[stage]->Finish(
        [&](std::string_view emitted, bool ends) { Feed(stage + 1, emitted, ends, text); });
  }
}

std::unique_ptr<DecoderRun> TokenDecoder::Start() const {
  std::vector<std::unique_ptr<DecoderStage>> stages;
  for (const auto& make_stage : stages_) stages.push_back(make_stage());
  return std::make_unique<DecoderRun>(std::move(stages));
}

absl::StatusOr<TokenDecoder> TokenDecoder::Parse(const JsonField& field) {
  TokenDecoder decoder;
  if (field.is_null()) {
    decoder.stages_.push_back([] { return std::make_unique<SpaceBetweenStage>(); });
  } else {
    NESTOR_RETURN_IF_ERROR(decoder.ParseStages(field));
  }
  return decoder;
}

absl::Status TokenDecoder::ParseReplace(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(TextPattern pattern, TextPattern::Parse(field.Member("pattern")));
  NESTOR_ASSIGN_OR_RETURN(const std::string content, field.GetString("content"));
  patterns_.push_back(std::make_unique<TextPattern>(std::move(pattern)));
  const TextPattern* borrowed = patterns_.back().get();
  stages_.push_back(
      [borrowed, content] { return std::make_unique<ReplaceStage>(borrowed, content); });
  return absl::OkStatus();
}

absl::Status TokenDecoder::ParseStrip(const JsonField& field) {
  StripStage::Options options;
  NESTOR_ASSIGN_OR_RETURN(options.content, field.GetString("content"));
  NESTOR_RETURN_IF_ERROR(RequireOneCharacter(field.Member("content"), options.content));
  NESTOR_ASSIGN_OR_RETURN(options.num_start, field.GetInt("start", 0));
  NESTOR_ASSIGN_OR_RETURN(options.num_stop, field.GetInt("stop", 0));
  stages_.push_back([options] { return std::make_unique<StripStage>(options); });
  return absl::OkStatus();
}

absl::Status TokenDecoder::ParseStages(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(const std::string type, field.GetString("type"));
  if (type == "Sequence") {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> entries,
                            field.Member("decoders").Entries());
    for (const JsonField& entry : entries) NESTOR_RETURN_IF_ERROR(ParseStages(entry));
  } else if (type == "ByteLevel") {
    stages_.push_back([] { return std::make_unique<ByteLevelStage>(); });
  } else if (type == "Fuse") {
    stages_.push_back([] { return std::make_unique<FuseStage>(); });
  } else if (type == "ByteFallback") {
    stages_.push_back([] { return std::make_unique<ByteFallbackStage>(); });
  } else if (type == "Replace") {
    return ParseReplace(field);
  } else if (type == "Strip") {
    return ParseStrip(field);
  } else if (type == "WordPiece") {
    NESTOR_ASSIGN_OR_RETURN(const std::string prefix, field.GetString("prefix", "##"));
    NESTOR_ASSIGN_OR_RETURN(const bool cleans_up, field.GetBool("cleanup", true));
    stages_.push_back(
        [prefix, cleans_up] { return std::make_unique<WordPieceStage>(prefix, cleans_up); });
  } else if (type == "Metaspace") {
    NESTOR_ASSIGN_OR_RETURN(const std::string mark, field.GetString("replacement", "▁"));
    NESTOR_RETURN_IF_ERROR(RequireOneCharacter(field.Member("replacement"), mark));
    NESTOR_ASSIGN_OR_RETURN(const bool adds_space, field.GetBool("add_prefix_space", true));
    NESTOR_ASSIGN_OR_RETURN(const std::string scheme,
                            field.GetString("prepend_scheme", adds_space ? "always" : "never"));
    const bool drops_first = scheme != "never";
    stages_.push_back(
        [mark, drops_first] { return std::make_unique<MetaspaceStage>(mark, drops_first); });
  } else if (type == "BPEDecoder") {
    NESTOR_ASSIGN_OR_RETURN(const std::string suffix, field.GetString("suffix", "</w>"));
    stages_.push_back([suffix] { return std::make_unique<WordSuffixStage>(suffix); });
  } else {
    return field.Member("type").Error(absl::StrCat("decoder \"", type, "\" is not supported"));
  }
  return absl::OkStatus();
}

}  // namespace nestor
