// Draws tokens from processed logits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "abi.h"
#include "gumbel.h"
#include "guard.h"
#include "handles.h"
#include "row_best.h"

namespace octavo {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kNoToken = -1;
constexpr float kAnyWord = 0x1p32f;
constexpr ptrdiff_t kFewCandidates = 64;  // are sorted

// ---------------------------------------------------------------- argmax

// The largest value, or -inf if there is none.
float largest_of(const float* values, int64_t size) {
  Vec largest = broadcast(kMinusInfinity);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) largest = maximum(load(values + i), largest);
  float result = max_lanes(largest);
  for (; i < size; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// The lowest index of the largest value.
int32_t argmax(const float* values, int32_t size) {
  const float largest = largest_of(values, size);
  if (largest == kMinusInfinity) return kNoToken;
  return static_cast<int32_t>(std::find(values, values + size, largest) - values);
}

// ---------------------------------------------------------------- which tokens may be drawn

struct Candidate {
  float value;
  int32_t token_id;
};

// A candidate's share of the probability, and how far its logit lies from the expected one.
struct Weight {
  float distance;
  double weight;
};

bool is_before(const Candidate& a, const Candidate& b) {
  return a.value != b.value ? a.value > b.value : a.token_id < b.token_id;
}

// e^x for x <= 0, below -700 that of -700, to about one unit in the last place; plain arithmetic, so that loops over it
// become vector code.
double exp_of_negative(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  x = x > -700.0 ? x : -700.0;
  const double shifted = x * 1.4426950408889634 + kMagic;
  const double n = shifted - kMagic;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double power = 1.0 / 6227020800.0;  // Taylor's series, from 1 / 13! down
  constexpr double kFactors[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0,
                                 120.0,       24.0,       6.0,       2.0,      1.0,     1.0};
  for (double factor : kFactors) power = power * r + 1.0 / factor;
  uint64_t exponent, word;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&word, &power, sizeof word);
  word += exponent << 52;
  double result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// One row of logits on its way to a token. Memory is kept from row to row.
class RowSampler {
 public:
  int32_t draw(const float* logits, int32_t vocab_size, const OctavoDraw& draw);

 private:
  void scale(const float* logits, float temperature);
  void filter(const OctavoDraw& draw);
  double standard_deviation() const;
  void collect(float lowest);
  float lower_bound_of_top_k(int32_t top_k);
  void keep_top_k(int32_t top_k);
  void keep_top_p(double top_p);
  template <class ValueAt>
  double sum_of_weights(size_t count, const ValueAt& value_at) const;
  double sum_of_weights(const Candidate* begin, const Candidate* end) const;
  bool cut_at(double top_p, double total);
  void keep_typical(double typical_p);
  void drop_all_but_candidates();
  int32_t argmax_with_noise(const NoiseKey& key);
  void limit_words(float bar);

  int32_t vocab_size_ = 0;
  float largest_ = kMinusInfinity;
  std::vector<float> scaled_;         // logits / temperature, padded with -inf to whole noise blocks
  std::vector<float> block_largest_;  // the largest of each kNoiseTokens, padded with -inf to whole vectors
  std::vector<float> word_limit_;     // by block: no word above it brings enough noise
  std::vector<float> order_;
  std::vector<Candidate> candidates_;
  std::vector<Weight> weights_;  // of candidates_
};

int32_t RowSampler::draw(const float* logits, int32_t vocab_size, const OctavoDraw& draw) {
  if (draw.temperature == 0.0f) return argmax(logits, vocab_size);
  vocab_size_ = vocab_size;
  scale(logits, draw.temperature);
  if (largest_ == kMinusInfinity) return kNoToken;
  filter(draw);
  return argmax_with_noise({draw.seed, draw.position, draw.candidate_index});
}

void RowSampler::scale(const float* logits, float temperature) {
  const int64_t num_blocks = round_up(divide_up(vocab_size_, kNoiseTokens), kLanes);
  scaled_.resize(num_blocks * kNoiseTokens);
  block_largest_.resize(num_blocks);
  for (int32_t i = 0; i < vocab_size_; ++i) scaled_[i] = logits[i] / temperature;
  std::fill(scaled_.begin() + vocab_size_, scaled_.end(), kMinusInfinity);
  for (int64_t block = 0; block < num_blocks; ++block)
    block_largest_[block] = largest_of(scaled_.data() + block * kNoiseTokens, kNoiseTokens);
  largest_ = largest_of(block_largest_.data(), num_blocks);
}

// Leave in scaled_ only what may be drawn; the rest becomes -inf.
void RowSampler::filter(const OctavoDraw& draw) {
  const bool has_top_k = draw.top_k > 0 && draw.top_k < vocab_size_;
  const bool has_top_p = draw.top_p < 1.0;
  const bool has_min_p = draw.min_p > 0.0;
  if (draw.top_n_sigma > 0.0) {
    collect(largest_ - static_cast<float>(draw.top_n_sigma * standard_deviation()));
    drop_all_but_candidates();
  }
  const bool has_typical_p = draw.typical_p < 1.0;
  if (!has_top_k && !has_top_p && !has_min_p && !has_typical_p) return;
  const float min_p_floor = has_min_p ? largest_ + static_cast<float>(std::log(draw.min_p)) : kMinusInfinity;
  if (has_top_k) {
    keep_top_k(draw.top_k);
  } else if (!has_top_p) {
    collect(min_p_floor);
  }
  if (has_top_p) {
    if (has_top_k) {
      cut_at(draw.top_p, sum_of_weights(candidates_.data(), candidates_.data() + candidates_.size()));
    } else {
      keep_top_p(draw.top_p);
    }
  }
  const auto is_too_low = [min_p_floor](const Candidate& c) { return c.value < min_p_floor; };
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), is_too_low), candidates_.end());
  if (has_typical_p && !candidates_.empty()) keep_typical(draw.typical_p);
  drop_all_but_candidates();
}

// Of all logits that are not -inf, in an order that no instruction set changes.
double RowSampler::standard_deviation() const {
  double count = 0.0, sum = 0.0, squares = 0.0;  // of the distances from the largest one
  for (int32_t i = 0; i < vocab_size_; ++i) {
    if (scaled_[i] == kMinusInfinity) continue;
    const double distance = static_cast<double>(scaled_[i]) - largest_;
    count += 1.0;
    sum += distance;
  }
  const double mean = sum / count;
  for (int32_t i = 0; i < vocab_size_; ++i) {
    if (scaled_[i] == kMinusInfinity) continue;
    const double difference = static_cast<double>(scaled_[i]) - largest_ - mean;
    squares += difference * difference;
  }
  return std::sqrt(squares / count);
}

// Make candidates_ of all tokens at or above `lowest`, in the order of their ids.
void RowSampler::collect(float lowest) {
  candidates_.clear();
  for (size_t block = 0; block < block_largest_.size(); ++block) {
    if (!(block_largest_[block] >= lowest)) continue;
    const int32_t begin = static_cast<int32_t>(block) * kNoiseTokens;
    for (int32_t i = begin; i < begin + kNoiseTokens; ++i) {
      if (scaled_[i] >= lowest && scaled_[i] > kMinusInfinity) candidates_.push_back({scaled_[i], i});
    }
  }
}

// k blocks have their largest value at or above the k-th largest of these: so have k tokens.
float RowSampler::lower_bound_of_top_k(int32_t top_k) {
  if (static_cast<size_t>(top_k) > block_largest_.size()) return kMinusInfinity;
  order_ = block_largest_;
  std::nth_element(order_.begin(), order_.begin() + top_k - 1, order_.end(), std::greater<float>());
  return order_[top_k - 1];
}

void RowSampler::keep_top_k(int32_t top_k) {
  collect(lower_bound_of_top_k(top_k));
  if (candidates_.size() <= static_cast<size_t>(top_k)) return;
  std::nth_element(candidates_.begin(), candidates_.begin() + top_k, candidates_.end(), is_before);
  candidates_.resize(top_k);
}

// Top-p over the whole vocabulary. Most of the probability lies close to the largest logit, so
// look only that far, and further where it does not suffice.
void RowSampler::keep_top_p(double top_p) {
  const double total = sum_of_weights(scaled_.size(), [this](size_t i) { return scaled_[i]; });
  for (const float depth : {4.0f, 8.0f, 16.0f}) {
    collect(largest_ - depth);
    if (cut_at(top_p, total)) return;
  }
  collect(kMinusInfinity);
  cut_at(top_p, total);
}

// The sum of e^(value - largest) over `count` values, in an order that no instruction set changes.
template <class ValueAt>
double RowSampler::sum_of_weights(size_t count, const ValueAt& value_at) const {
  constexpr size_t kSums = 8, kChunk = 256;
  double weights[kChunk], sums[kSums] = {};
  for (size_t begin = 0; begin < count; begin += kChunk) {
    const size_t size = std::min(kChunk, count - begin), padded_size = round_up(size, kSums);
    for (size_t i = 0; i < size; ++i) weights[i] = exp_of_negative(static_cast<double>(value_at(begin + i)) - largest_);
    std::fill(weights + size, weights + padded_size, 0.0);
    for (size_t i = 0; i < padded_size; i += kSums)
      for (size_t j = 0; j < kSums; ++j) sums[j] += weights[i + j];
  }
  return std::accumulate(sums, sums + kSums, 0.0);
}

double RowSampler::sum_of_weights(const Candidate* begin, const Candidate* end) const {
  return sum_of_weights(end - begin, [begin](size_t i) { return begin[i].value; });
}

// Keep as few of the best candidates as reach top_p of the total with their weights. Returns false, and keeps all, where they
// do not. Halves are told apart before anything is sorted: a flat distribution has tens of thousands of candidates.
bool RowSampler::cut_at(double top_p, double total) {
  const double wanted = top_p * total;
  Candidate* begin = candidates_.data();
  Candidate* end = begin + candidates_.size();
  const Candidate* const end_of_all = end;
  double sum = 0.0;  // of those before `begin`, which are kept
  while (end - begin > kFewCandidates) {
    Candidate* const middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, is_before);
    const double sum_of_half = sum + sum_of_weights(begin, middle);
    if (sum_of_half >= wanted) {
      end = middle;
    } else {
      sum = sum_of_half;
      begin = middle;
    }
  }
  std::sort(begin, end, is_before);
  do {
    sum += sum_of_weights(begin, begin + 1);
    ++begin;
  } while (begin < end && sum < wanted);
  if (begin == end_of_all && sum < wanted) return false;
  candidates_.resize(begin - candidates_.data());
  return true;
}

// Keep the candidates whose logits lie nearest to the expected one, which are those whose information lies nearest to the
// entropy: as few as reach typical_p of the total with their weights, and all that are as near as the last of them.
void RowSampler::keep_typical(double typical_p) {
  weights_.clear();
  double total = 0.0, sum_of_depths = 0.0;
  for (const Candidate& c : candidates_) {
    const double depth = static_cast<double>(c.value) - largest_;
    weights_.push_back({0.0f, exp_of_negative(depth)});
    total += weights_.back().weight;
    sum_of_depths += weights_.back().weight * depth;
  }
  const float expected = static_cast<float>(largest_ + sum_of_depths / total);
  for (size_t i = 0; i < candidates_.size(); ++i) weights_[i].distance = std::fabs(candidates_[i].value - expected);
  const auto is_nearer = [](const Weight& a, const Weight& b) { return a.distance < b.distance; };
  auto begin = weights_.begin(), end = weights_.end();  // the last one to be kept is among these
  double sum = 0.0;                                      // of those before, which are kept
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, is_nearer);
    double sum_of_half = sum;
    for (auto each = begin; each < middle; ++each) sum_of_half += each->weight;
    if (sum_of_half >= typical_p * total) {
      end = middle;
    } else {
      sum = sum_of_half;
      begin = middle;
    }
  }
  const float radius = begin->distance;
  const auto is_too_far = [=](const Candidate& c) { return std::fabs(c.value - expected) > radius; };
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), is_too_far), candidates_.end());
}

void RowSampler::drop_all_but_candidates() {
  std::fill(scaled_.begin(), scaled_.end(), kMinusInfinity);
  std::fill(block_largest_.begin(), block_largest_.end(), kMinusInfinity);
  for (const Candidate& candidate : candidates_) {
    scaled_[candidate.token_id] = candidate.value;
    float& largest = block_largest_[candidate.token_id / kNoiseTokens];
    largest = std::max(largest, candidate.value);
  }
}

// ---------------------------------------------------------------- the draw

// The best token so far, separately for each lane and each of the four words of a counter.
struct LaneBest {
  Vec value = broadcast(kMinusInfinity);
  IntVec token_id = IntVec{} + kNoToken;

  void offer(Vec other, IntVec other_token_id) {
    const auto is_better = other > value;
    value = is_better ? other : value;
    token_id = is_better ? other_token_id : token_id;
  }
};

UintVec lowest_of(const UintVec (&words)[4]) {
  UintVec lowest = words[0];
  for (const UintVec& some : words) lowest = some < lowest ? some : lowest;
  return lowest;
}

// The tokens of a block, unless all of its words are above the limit.
void offer_block(const NoiseKey& key, const float* scaled, int32_t block, float word_limit, LaneBest (&best)[4]) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const IntVec counter = lane + block * kLanes;
  UintVec words[4];
  philox(key, reinterpret_cast<UintVec>(counter), words);
  if (!any_lane(__builtin_convertvector(lowest_of(words), Vec) <= broadcast(word_limit))) return;
  float by_word[4][kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int word = 0; word < 4; ++word) by_word[word][i] = scaled[i * 4 + word];
  for (int word = 0; word < 4; ++word)
    best[word].offer(load(by_word[word]) + gumbel(words[word]), counter * 4 + word);
}

Candidate best_of(const LaneBest (&best)[4]) {
  Candidate result{kMinusInfinity, kNoToken};
  for (const LaneBest& lanes : best) {
    for (int i = 0; i < kLanes; ++i) {
      const Candidate candidate{lanes.value[i], lanes.token_id[i]};
      if (candidate.token_id != kNoToken && (result.token_id == kNoToken || is_before(candidate, result)))
        result = candidate;
    }
  }
  return result;
}

// The noise -ln(-ln(1 - w)) of a word w 2^32 is at most -ln(w): to lift the largest of a block to the bar it takes a word of at
// most 2^32 e^(largest - bar).
void RowSampler::limit_words(float bar) {
  constexpr float kLog2E = 1.44269504f;
  const float margin = 0.01f + std::fabs(bar) * 0x1p-21f;  // more than the roundings of noise, sums and limit
  word_limit_.resize(block_largest_.size());
  for (size_t i = 0; i < block_largest_.size(); i += kLanes) {
    const Vec above_bar = minimum(load(&block_largest_[i]) - broadcast(bar - margin), Vec{});
    store(&word_limit_[i], exp2(above_bar * broadcast(kLog2E) + broadcast(32.0f)));
  }
}

int32_t RowSampler::argmax_with_noise(const NoiseKey& key) {
  const int32_t num_blocks = static_cast<int32_t>(block_largest_.size());
  // What the most likely block reaches is a bar: of blocks that miss it with the largest noise there is no words are computed,
  // and of those that miss it with the noise of their words no noise.
  const int32_t likeliest = argmax(block_largest_.data(), num_blocks);
  if (likeliest == kNoToken) return kNoToken;  // a filter has left nothing
  LaneBest of_likeliest[4];
  offer_block(key, scaled_.data() + int64_t{likeliest} * kNoiseTokens, likeliest, kAnyWord, of_likeliest);
  const float bar = best_of(of_likeliest).value;
  limit_words(bar);
  LaneBest best[4];
  for (int32_t block = 0; block < num_blocks; ++block) {
    if (block_largest_[block] + kLargestNoise >= bar && block_largest_[block] > kMinusInfinity)
      offer_block(key, scaled_.data() + int64_t{block} * kNoiseTokens, block, word_limit_[block], best);
  }
  return best_of(best).token_id;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

void octavo_mask(float* logits, const uint32_t* allowed, int32_t size) {
  for (int32_t start = 0; start < size; start += 32) {
    const uint32_t word = allowed[start / 32];
    if (word == ~uint32_t{0}) continue;
    float* piece = logits + start;
    const int32_t count = std::min(size - start, 32);
    // Without a branch for each bit, so that this becomes vector code.
    for (int32_t bit = 0; bit < count; ++bit) piece[bit] = word >> bit & 1 ? piece[bit] : kMinusInfinity;
  }
}

int32_t octavo_draw(OctavoPool* pool, const float* logits, int64_t stride, int32_t num_rows, int32_t vocab_size,
                    const OctavoDraw* draws, int32_t* token_ids) {
  return guarded([&] {
    std::vector<RowSampler> samplers(pool->threads.num_threads());
    pool->threads.for_each(num_rows, [&](int64_t row, int thread) {
      token_ids[row] = samplers[thread].draw(logits + row * stride, vocab_size, draws[row]);
    });
  });
}

int32_t octavo_argmax(OctavoPool* pool, const float* logits, int64_t stride, int32_t num_rows, int32_t vocab_size,
                      int32_t* token_ids) {
  return guarded([&] {
    pool->threads.for_each(num_rows, [&](int64_t row, int) {
      RowBest best;
      best.take(logits + row * stride, vocab_size, 0);
      token_ids[row] = best.token();
    });
  });
}
