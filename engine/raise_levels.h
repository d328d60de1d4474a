#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/nested_model.h"
#include "kernels/backend.h"

namespace nestor {

// Levels as a set of bits; a model with more than 64 levels has none beyond the 64th in it.
using LevelSet = uint64_t;
inline constexpr int kMaxLevelsInSet = 64;
inline LevelSet SetOf(int level) { return level < kMaxLevelsInSet ? LevelSet{1} << level : 0; }

// Decides at which level each entry of a step runs: at the one it asks for, or at a better one that
// the step reads anyway.
//
// A step takes about the time of its bytes, read once for all rows, plus that of its FLOPs. Where
// one row runs the full level, a residual row beside it reads factors and multiplies by them for
// nothing: the dense weights are there, and cost it less. A prefix row saves FLOPs, which pays only
// from some number of rows on.
class LevelRaiser {
 public:
  // All are borrowed. `dense` is how each dense form is stored.
  LevelRaiser(const std::vector<LinearSpec>* layers, const std::vector<Level>* levels,
              DenseStorage dense, const Backend* backend);

  struct Entry {
    int64_t rows = 0;
    int level = 0;
    LevelSet may_run = 0;  // besides `level`
  };
  // Sets `level` of the entries to what they run at: a level that is asked for in the step, is in
  // their set and is better (above theirs on its ladder, the full one, or of higher quality),
  // wherever that does not make the step dearer.
  void Raise(std::span<Entry> entries);

  // Bytes of a pass over rows at `levels`, each part read once. Layers and the head alike.
  int64_t BytesOf(LevelSet levels);

 private:
  double CostOf(std::span<const Entry> entries, int target, const StepCosts& costs);
  bool Moves(const Entry& entry, int target) const;

  const std::vector<LinearSpec>& layers_;
  const std::vector<Level>& levels_;
  const DenseStorage dense_;
  const Backend* const backend_;
  // FLOPs of a row by level.
  struct RowWork {
    double dense = 0;   // of both planes, the coarse and the middle one, or dense weights
    double coarse = 0;  // of the coarse plane alone
    double factors = 0;
  };
  std::vector<RowWork> row_work_;
  // Of sets seen lately, each in the one place that is its own; a set of no level is a free place.
  struct BytesOfSet {
    LevelSet levels = 0;
    int64_t bytes = 0;
  };
  std::array<BytesOfSet, 256> bytes_;
};

}  // namespace nestor
