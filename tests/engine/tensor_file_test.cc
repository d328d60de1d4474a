#include "engine/tensor_file.h"

#include <cstring>
#include <random>

#include "base/bfloat16.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::vector<float> RandomFloats(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

// A file of two tensors, "a" [3, 5] and "b" [7].
class TensorFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto writer =
        TensorFileWriter::Create(path(), {{"a", DType::kF32, {3, 5}}, {"b", DType::kBf16, {7}}});
    ASSERT_TRUE(writer.ok()) << writer.status();
    // Written in another order than announced.
    ASSERT_TRUE((*writer)->Write("b", std::as_bytes(std::span<const uint16_t>(b_))).ok());
    ASSERT_TRUE((*writer)->Write("a", std::as_bytes(std::span<const float>(a_))).ok());
    ASSERT_TRUE((*writer)->Finish().ok());
  }
  std::string path() const { return directory_.path() + "/model.safetensors"; }

  // Replaces the file by what `change` makes of its bytes, and returns what opening it says.
  template <typename Change>
  absl::Status OpenChanged(Change change) {
    std::string bytes = *ReadFile(path());
    change(&bytes);
    EXPECT_TRUE(WriteFileAtomically(path(), bytes).ok());
    return TensorFile::Open({path()}).status();
  }

  TemporaryDirectory directory_;
  const std::vector<float> a_ = RandomFloats(15, 1);
  const std::vector<uint16_t> b_ = {0x3f80, 0x4000, 0xbf80, 0x0001, 0x7f80, 0x3e80, 0xc000};
};

std::string WithHeader(const std::string& header, size_t data_size) {
  const uint64_t length = header.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof(length));
  return bytes + header + std::string(data_size, 'x');
}

TEST_F(TensorFileTest, WhatWasWrittenIsRead) {
  const auto file = TensorFile::OpenCheckpoint(directory_.path());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(*(*file)->GetFloats("a", {3, 5}), a_);
  const std::vector<float> b = *(*file)->GetFloats("b", {-1});
  EXPECT_EQ(b[1], 2.0f);
  EXPECT_EQ(b[6], -2.0f);
}

TEST_F(TensorFileTest, AnOptionalPrefixIsLeftOutOfNames) {
  const std::string header =
      R"({"model.a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]},
          "b": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]}})";
  ASSERT_TRUE(WriteFileAtomically(path(), WithHeader(header, 3)).ok());
  const auto file = TensorFile::Open({path()}, "model.");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE((*file)->Has("a") && (*file)->Has("b"));
  EXPECT_FALSE((*file)->Has("model.a"));
}

TEST_F(TensorFileTest, TheSameNameWithAndWithoutThePrefixIsRefused) {
  const std::string header =
      R"({"model.a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
          "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}})";
  ASSERT_TRUE(WriteFileAtomically(path(), WithHeader(header, 2)).ok());
  EXPECT_TRUE(TensorFile::Open({path()}).ok());
  EXPECT_THAT(std::string(TensorFile::Open({path()}, "model.").status().message()),
              AllOf(HasSubstr(path()), HasSubstr("tensor a is also in")));
}

TEST_F(TensorFileTest, AMissingTensorIsNamedWithItsShape) {
  const auto file = TensorFile::Open({path()});
  EXPECT_THAT(std::string((*file)->Get("c", {2, 2}).status().message()),
              AllOf(HasSubstr(path()), HasSubstr("tensor c"), HasSubstr("[2, 2]")));
}

TEST_F(TensorFileTest, AnotherShapeIsNamedWithTheExpectedOne) {
  const auto file = TensorFile::Open({path()});
  EXPECT_THAT(std::string((*file)->Get("a", {5, 3}).status().message()),
              AllOf(HasSubstr("tensor a"), HasSubstr("[3, 5]"), HasSubstr("[5, 3]")));
}

TEST_F(TensorFileTest, ATruncatedFileIsRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) { bytes->pop_back(); }).message()),
              AllOf(HasSubstr(path()), HasSubstr("tensor b"), HasSubstr("truncated")));
}

TEST_F(TensorFileTest, AFileShorterThanItsHeaderIsRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) { bytes->resize(20); }).message()),
              HasSubstr("truncated"));
}

TEST_F(TensorFileTest, AnEmptyFileIsRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) { bytes->clear(); }).message()),
              HasSubstr("truncated"));
}

TEST_F(TensorFileTest, AHeaderThatIsNoJsonIsRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) { (*bytes)[8] = '?'; }).message()),
              HasSubstr("no JSON"));
}

TEST_F(TensorFileTest, AnUnknownTypeIsNamed) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) {
                            bytes->replace(bytes->find("\"F32\""), 5, "\"F99\"");
                          }).message()),
              AllOf(HasSubstr("tensor a"), HasSubstr("F99")));
}

TEST_F(TensorFileTest, OffsetsThatDoNotFitTheShapeAreRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) {
                            *bytes = WithHeader(
                                R"({"a":{"dtype":"F32","shape":[3,5],"data_offsets":[0,56]}})", 60);
                          }).message()),
              AllOf(HasSubstr("tensor a"), HasSubstr("needs 60 bytes")));
}

TEST_F(TensorFileTest, OverlappingTensorsAreRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) {
                            *bytes = WithHeader(
                                R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
                                R"("b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}})",
                                12);
                          }).message()),
              AllOf(HasSubstr("a and b"), HasSubstr("overlap")));
}

TEST_F(TensorFileTest, AShapeWhoseSizeOverflowsIsRefused) {
  EXPECT_THAT(std::string(OpenChanged([](std::string* bytes) {
                            *bytes = WithHeader(
                                R"({"a":{"dtype":"F32","shape":[140737488355328,140737488355328],)"
                                R"("data_offsets":[0,8]}})",
                                8);
                          }).message()),
              HasSubstr("overflows"));
}

TEST_F(TensorFileTest, SeveralFilesAreReadThroughTheIndex) {
  const std::string second = directory_.path() + "/second.safetensors";
  auto writer = TensorFileWriter::Create(second, {{"c", DType::kF32, {2}}});
  const std::vector<float> c = {1.5f, -2.5f};
  ASSERT_TRUE((*writer)->Write("c", std::as_bytes(std::span<const float>(c))).ok());
  ASSERT_TRUE((*writer)->Finish().ok());
  ASSERT_TRUE(WriteFileAtomically(directory_.path() + "/model.safetensors.index.json",
                                  R"({"weight_map": {"a": "model.safetensors",
                                  "b": "model.safetensors", "c": "second.safetensors"}})")
                  .ok());
  const auto file = TensorFile::OpenCheckpoint(directory_.path());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(*(*file)->GetFloats("c", {2}), c);
  EXPECT_EQ(*(*file)->GetFloats("a", {3, 5}), a_);
}

TEST_F(TensorFileTest, AnIndexThatLeavesTheDirectoryIsRefused) {
  ASSERT_TRUE(WriteFileAtomically(directory_.path() + "/model.safetensors.index.json",
                                  R"({"weight_map": {"a": "../model.safetensors"}})")
                  .ok());
  EXPECT_FALSE(TensorFile::OpenCheckpoint(directory_.path()).ok());
}

TEST_F(TensorFileTest, AMissingFileIsNotFound) {
  EXPECT_TRUE(absl::IsNotFound(TensorFile::Open({"/nowhere/x"}).status()));
}

TEST(TensorFileWriterTest, ATensorThatWasNotWrittenFailsTheFile) {
  const TemporaryDirectory directory;
  auto writer = TensorFileWriter::Create(directory.path() + "/x", {{"a", DType::kU8, {1}}});
  EXPECT_THAT(std::string((*writer)->Finish().message()), HasSubstr("tensor a was never written"));
}

TEST(TensorFileWriterTest, AFullDiskIsSaid) {
  auto writer = TensorFileWriter::Create("/dev/full", {{"a", DType::kU8, {1}}});
  EXPECT_TRUE(absl::IsResourceExhausted(writer.status())) << writer.status();
}

TEST(Float16Test, EveryKindOfNumberConverts) {
  EXPECT_EQ(FloatFromFloat16(0x3c00), 1.0f);
  EXPECT_EQ(FloatFromFloat16(0xc000), -2.0f);
  EXPECT_EQ(FloatFromFloat16(0x7bff), 65504.0f);
  EXPECT_EQ(FloatFromFloat16(0x0001), 0x1p-24f);
  EXPECT_EQ(FloatFromFloat16(0x8001), -0x1p-24f);
  EXPECT_TRUE(std::isinf(FloatFromFloat16(0x7c00)));
  EXPECT_TRUE(std::isnan(FloatFromFloat16(0x7e00)));
}

TEST(Bfloat16Test, RoundsToNearestEven) {
  EXPECT_EQ(Bfloat16FromFloat(1.0f), 0x3f80);
  EXPECT_EQ(Bfloat16FromFloat(1.0f + 0x1p-8f), 0x3f80);
  EXPECT_EQ(Bfloat16FromFloat(1.0f + 0x3p-8f), 0x3f82);
  EXPECT_TRUE(std::isnan(FloatFromBfloat16(Bfloat16FromFloat(std::nanf("")))));
}

}  // namespace
}  // namespace nestor
