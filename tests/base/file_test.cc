#include "base/file.h"

#include <cerrno>
#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;

TEST(FileTest, WhatWasWrittenIsRead) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/x";
  const std::string content("a\0b\nc", 5);
  ASSERT_TRUE(WriteFileAtomically(path, content).ok());
  EXPECT_EQ(*ReadFile(path), content);
}

TEST(FileTest, AWriteReplacesTheFileAndLeavesNothingBeside) {
  const TemporaryDirectory directory;
  const std::string path = directory.path() + "/x";
  ASSERT_TRUE(WriteFileAtomically(path, "first, and longer").ok());
  ASSERT_TRUE(WriteFileAtomically(path, "second").ok());
  EXPECT_EQ(*ReadFile(path), "second");
  const auto entries = std::filesystem::directory_iterator(directory.path());
  EXPECT_EQ(std::distance(begin(entries), end(entries)), 1);
}

TEST(FileTest, AnEmptyFileHasNoBytes) {
  const TemporaryDirectory directory;
  ASSERT_TRUE(WriteFileAtomically(directory.path() + "/x", "").ok());
  EXPECT_EQ(*ReadFile(directory.path() + "/x"), "");
}

TEST(FileTest, ErrorsNameThePath) {
  EXPECT_TRUE(absl::IsNotFound(ReadFile("/nowhere/x").status()));
  EXPECT_THAT(std::string(ReadFile("/nowhere/x").status().message()), HasSubstr("/nowhere/x"));
  EXPECT_FALSE(ReadFile("/").ok());
  EXPECT_TRUE(absl::IsResourceExhausted(FileError("x", ENOSPC)));
  EXPECT_TRUE(absl::IsPermissionDenied(FileError("x", EACCES)));
}

}  // namespace
}  // namespace nestor
