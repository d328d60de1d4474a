#pragma once

#include <cstdint>
#include <vector>

#include "base/check.h"

namespace nestor {

// Which pages of the KV cache are free. Not thread-safe.
class KvPages {
 public:
  KvPages(int64_t num_pages, int64_t page_size) : page_size_(page_size), num_pages_(num_pages) {
    for (int64_t page = num_pages - 1; page >= 0; --page) {
      free_.push_back(static_cast<int32_t>(page));
    }
  }

  int64_t PagesFor(int64_t positions) const { return (positions + page_size_ - 1) / page_size_; }
  int64_t num_pages() const { return num_pages_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

  // REQUIRES: count <= num_free().
  std::vector<int32_t> Take(int64_t count) {
    NESTOR_CHECK(count <= num_free());
    std::vector<int32_t> pages(free_.end() - count, free_.end());
    free_.resize(free_.size() - static_cast<size_t>(count));
    return pages;
  }
  void Return(const std::vector<int32_t>& pages) {
    free_.insert(free_.end(), pages.begin(), pages.end());
    NESTOR_CHECK(num_free() <= num_pages_);
  }

 private:
  int64_t page_size_;
  int64_t num_pages_;
  std::vector<int32_t> free_;
};

}  // namespace nestor
