// From logits to tokens, a block for each row; ids stay on the device.
//
// The order is that of shape.rs and sampler.rs: bias, repetition, frequency and presence, ends held off, the mask of a
// form; then temperature, min_p, top_k, top_p. Log probabilities are those of the model's own logits. The draw is a
// Gumbel-max (Gumbel 1954; as vLLM and FlashInfer sample): of the tokens left, the one with the largest
// logit / temperature + Gumbel noise, the noise made by Philox from (seed, sample, position, token) alone.
//
// The borders of top_k and top_p are found by a radix search over keys that order tokens as `key` in sampler.rs does
// (after Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units"). Probabilities are added up as
// whole numbers, 2^32 for the best token's, so a sum has the same bits in any order. twin.rs has all of it once more.
#include "device.cuh"

constexpr int SAMPLER_THREADS = 512;
constexpr int DIGITS = 256;
constexpr u32 NO_TOKEN = 0xffffffffu;
constexpr float FORBIDDEN = -3.40282347e38f;
constexpr float LARGEST = 3.40282347e38f;

// What is known of a row, 18 words; as `SamplerRow` in sampling.rs.
struct SamplerRow {
  u64 seed;
  u32 sample;
  u32 position;
  float temperature;  // 0: the best token
  float top_p;
  float min_p;
  u32 top_k;  // 0: all
  float repetition;
  float frequency;
  float presence;
  u32 entries;      // where its changes begin
  u32 entries_end;
  u32 mask;         // the first word of its mask, or NO_TOKEN
  u32 logprobs;     // how many best tokens are told with theirs, or NO_TOKEN: none, and not the token's either
  u32 known;        // a token that is scored and not chosen, or NO_TOKEN
  u32 shaped;       // its number among the rows that are changed, or NO_TOKEN
  u32 counted;      // a row of the step whose token was generated once more than the entries say, or NO_TOKEN
};

// A token whose logit is changed; a row has each token once.
struct SamplerEntry {
  u32 token;
  float bias;
  u32 count;  // how often it was generated
  u32 flags;  // 1: it repeats what stands in the prompt or was generated, 2: it may not come
};

struct SamplerParams {
  const float* logits;          // [rows, vocabulary]
  float* shaped;                // [rows that are changed, vocabulary], memory to work in
  const SamplerRow* rows;       // [rows]
  const SamplerEntry* entries;
  const u32* masks;             // a bit for each token that may come
  const u32* inputs;            // the tokens of the step's rows
  u32* ids;                     // [rows], or NO_TOKEN where a logit is no finite number
  float* logprobs;              // [rows]; the bits are such a logit's token then
  u32* top_ids;                 // [rows, top]
  float* top_logprobs;          // [rows, top]
  u32 vocabulary;
  u32 top;
};

__device__ inline u64 key_of(float logit, u32 token) {
  u32 bits = to_bits(logit);
  u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | static_cast<u32>(~token);
}

__device__ inline u32 token_of(u64 key) { return ~static_cast<u32>(key); }

// Whole numbers and keys have no order of addition to keep.
template <class Join> __device__ u64 block_join(u64 x, u64* room, Join join) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
  __syncthreads();
  if (lane_of() == 0) room[warp_of()] = x;
  __syncthreads();
  x = room[0];
  for (int warp = 1; warp < SAMPLER_THREADS / WARP; warp++) x = join(x, room[warp]);
  return x;
}

__device__ inline u64 block_max(u64 x, u64* room) {
  return block_join(x, room, [](u64 a, u64 b) { return a > b ? a : b; });
}

__device__ inline u64 block_total(u64 x, u64* room) {
  return block_join(x, room, [](u64 a, u64 b) { return a + b; });
}

// Salmon et al. 2011, as `philox` in sampler.rs: the words of tokens 4 * four .. 4 * four + 3.
__device__ inline uint4 random_words(const SamplerRow& row, u32 four) {
  u32 a = row.position, b = 1 + four, c = row.sample, d = 0;
  u32 k0 = static_cast<u32>(row.seed), k1 = static_cast<u32>(row.seed >> 32);
  for (int round = 0; round < 10; round++) {
    u32 low0 = a * 0xD2511F53u, high0 = high_product(a, 0xD2511F53u);
    u32 low1 = c * 0xCD9E8D57u, high1 = high_product(c, 0xCD9E8D57u);
    a = high1 ^ b ^ k0;
    b = low1;
    c = high0 ^ d ^ k1;
    d = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(a, b, c, d);
}

__device__ inline u32 word_of(const uint4& words, u32 token) {
  u32 which = token % 4;
  return which == 0 ? words.x : which == 1 ? words.y : which == 2 ? words.z : words.w;
}

// No word gives more noise than this.
constexpr float GUMBEL_MOST = 23.0f;

// -ln(-ln(u)) for u = (word + 1/2) / 2^32, exact where u is near 1 too: that is where the winners come from.
__device__ inline float gumbel(u32 word) {
  // 1 - u, which has all its digits where u is near 1.
  float rest = (static_cast<float>(~word) + 0.5f) * 2.3283064365386963e-10f;
  float waiting = rest < 0.29f ? -log_near_one(-rest)
                               : -log_of((static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f);
  return -log_of(waiting);
}

// e^((logit - largest) / temperature), or 0 where min_p or a mask leaves the token out.
__device__ inline float weight_of(const SamplerRow& row, float logit, float largest) {
  float weight = exp_of((logit - largest) / row.temperature);
  return logit > FORBIDDEN && weight >= row.min_p ? weight : 0.0f;
}

// Whether min_p and a mask leave the token, which they do whenever its weight is not 0: no weight is too small for a number.
__device__ inline bool is_left(const SamplerRow& row, float logit, float largest) {
  return row.min_p > 0.0f ? weight_of(row, logit, largest) > 0.0f : logit > FORBIDDEN;
}

__device__ inline u64 whole_of(float weight) { return static_cast<u64>(weight * 4294967296.0f); }

// As `change` in shape.rs: a finite logit stays one, however large what is asked for is.
__device__ inline float clamped(float logit) {
  logit = logit < FORBIDDEN ? FORBIDDEN : logit;
  return logit > LARGEST ? LARGEST : logit;
}

__device__ inline bool is_finite(float x) { return x * 0.0f == 0.0f; }

__device__ inline void change(const SamplerRow& row, const SamplerEntry& entry, float* shaped) {
  if (!is_finite(shaped[entry.token])) return;
  float logit = clamped(shaped[entry.token] + entry.bias);
  if (entry.flags & 1) logit = clamped(logit > 0.0f ? logit / row.repetition : logit * row.repetition);
  if (entry.count > 0) logit = clamped(logit - row.frequency * static_cast<float>(entry.count) - row.presence);
  shaped[entry.token] = entry.flags & 2 ? FORBIDDEN : logit;
}

// Writes the row's logits as they are changed before a token is chosen.
__device__ void shape(const SamplerParams& p, const SamplerRow& row, const float* logits, float* shaped) {
  __shared__ u32 has_entry;
  u32 counted = row.counted == NO_TOKEN ? NO_TOKEN : p.inputs[row.counted];
  if (threadIdx.x == 0) has_entry = 0;
  for (u32 token = threadIdx.x; token < p.vocabulary; token += SAMPLER_THREADS) shaped[token] = logits[token];
  __syncthreads();
  for (u32 i = row.entries + threadIdx.x; i < row.entries_end; i += SAMPLER_THREADS) {
    SamplerEntry entry = p.entries[i];
    if (entry.token == counted) {
      has_entry = 1;
      entry.count++;
      entry.flags |= 1;
    }
    if (entry.token < p.vocabulary) change(row, entry, shaped);
  }
  __syncthreads();
  if (threadIdx.x == 0 && !has_entry && counted < p.vocabulary) change(row, SamplerEntry{counted, 0.0f, 1, 1}, shaped);
  __syncthreads();
  if (row.mask == NO_TOKEN) return;
  for (u32 token = threadIdx.x; token < p.vocabulary; token += SAMPLER_THREADS) {
    if (!(p.masks[row.mask + token / 32] >> token % 32 & 1)) shaped[token] = FORBIDDEN;
  }
  __syncthreads();
}

// The key of the best token, and the first token whose logit is no finite number, or NO_TOKEN.
__device__ u64 best_key(const float* logits, u32 vocabulary, u64* room, u32& broken) {
  u64 best = 0, first = 0;
  for (u32 token = threadIdx.x; token < vocabulary; token += SAMPLER_THREADS) {
    u64 key = key_of(logits[token], token);
    best = key > best ? key : best;
    // Larger for a lower token.
    if (!is_finite(logits[token]) && first == 0) first = u64(1) << 32 | static_cast<u32>(~token);
  }
  best = block_max(best, room);
  first = block_max(first, room);
  broken = first == 0 ? NO_TOKEN : token_of(first);
  return best;
}

// Adds an amount to the sum of a digit, for all lanes of a warp. Logits are alike, so lanes mostly have the same few digits:
// those that have the same one are added up first, as one after the other they would wait for each other.
__device__ inline void add_to_digits(bool takes_part, u32 digit, u64 amount, u64* sums, u32* counts) {
  u32 left = takes_part ? digit + 1 : 0;
  for (;;) {
    u32 most = left;
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
      u32 other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    if (most == 0) return;
    u64 sum = left == most ? amount : 0;
    u32 count = left == most ? 1 : 0;
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
      count += shuffle_xor(count, mask);
    }
    if (lane_of() == 0) {
      atomicAdd(&sums[most - 1], sum);
      atomicAdd(&counts[most - 1], count);
    }
    if (left == most) left = 0;
  }
}

// Of the tokens with keys of `least` and above the smallest key for which the amounts of those that reach it come to
// `wanted`; what an amount is, a count or a probability, `amount` tells.
template <class Amount> __device__ u64 border(const float* logits, u32 vocabulary, u64 least, u64 wanted, Amount amount) {
  __shared__ u64 sums[DIGITS];
  __shared__ u32 counts[DIGITS];
  __shared__ u64 state[3];  // key so far, still wanted, tokens that have it
  u64 prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int digit = threadIdx.x; digit < DIGITS; digit += SAMPLER_THREADS) {
      sums[digit] = 0;
      counts[digit] = 0;
    }
    __syncthreads();
    // The lanes of a warp go together to the end.
    for (u32 first = 0; first < vocabulary; first += SAMPLER_THREADS) {
      u32 token = first + threadIdx.x;
      u64 key = token < vocabulary ? key_of(logits[token], token) : 0;
      bool takes_part = token < vocabulary && key >= least;
      takes_part = takes_part && (shift == 56 || key >> (shift + 8) == prefix >> (shift + 8));
      add_to_digits(takes_part, static_cast<u32>(key >> shift) % DIGITS, takes_part ? amount(logits[token]) : 0, sums, counts);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = DIGITS - 1;
      for (; digit > 0 && sums[digit] < wanted; digit--) wanted -= sums[digit];
      state[0] = prefix | static_cast<u64>(digit) << shift;
      state[1] = wanted;
      state[2] = counts[digit];
    }
    __syncthreads();
    prefix = state[0];
    wanted = state[1];
    // With one token left, all its other digits may as well be the smallest.
    if (state[2] <= 1) break;
  }
  return prefix > least ? prefix : least;
}

// The smallest key that top_k and top_p leave.
__device__ u64 least_key(const SamplerParams& p, const SamplerRow& row, const float* logits, float largest, u64* room) {
  u64 least = 0;
  if (row.top_k > 0 && row.top_k < p.vocabulary) {
    least = border(logits, p.vocabulary, 0, row.top_k, [](float) { return u64(1); });
  }
  if (row.top_p >= 1.0f) return least;
  auto amount = [&](float logit) { return whole_of(weight_of(row, logit, largest)); };
  u64 total = 0;
  for (u32 token = threadIdx.x; token < p.vocabulary; token += SAMPLER_THREADS) {
    if (key_of(logits[token], token) >= least) total += amount(logits[token]);
  }
  total = block_total(total, room);
  double target = static_cast<double>(row.top_p) * static_cast<double>(total);
  u64 wanted = static_cast<u64>(target);
  // Rounded up: a sum reaches the target when it is not below.
  wanted += static_cast<double>(wanted) < target ? 1 : 0;
  return border(logits, p.vocabulary, least, wanted > 0 ? wanted : 1, amount);
}

// The token of a row whose best token is known.
__device__ u32 choose(const SamplerParams& p, const SamplerRow& row, const float* logits, u64 best, u64* room) {
  if (row.temperature == 0.0f || row.top_k == 1) return token_of(best);
  u32 best_token = token_of(best);
  float largest = logits[best_token];
  u64 least = least_key(p, row, logits, largest, room);
  // The best token is always left. What could not come before it with the most of noise needs no random word.
  float bar = gumbel(word_of(random_words(row, best_token / 4), best_token));
  u64 drawn = key_of(bar, best_token);
  for (u32 four = threadIdx.x; four < (p.vocabulary + 3) / 4; four += SAMPLER_THREADS) {
    uint4 words = make_uint4(0, 0, 0, 0);
    bool has_words = false;
    for (u32 token = 4 * four; token < 4 * four + 4 && token < p.vocabulary; token++) {
      float logit = logits[token], scaled = (logit - largest) / row.temperature;
      if (scaled + GUMBEL_MOST < bar || key_of(logit, token) < least || !is_left(row, logit, largest)) continue;
      if (!has_words) words = random_words(row, four);
      has_words = true;
      float score = scaled + gumbel(word_of(words, token));
      bar = score > bar ? score : bar;
      u64 key = key_of(score, token);
      drawn = key > drawn ? key : drawn;
    }
  }
  return token_of(block_max(drawn, room));
}

// Log probabilities from the model's own logits: of the token, and of the best ones by turns. The first token whose logit
// is no finite number, or NO_TOKEN.
__device__ u32 score(const SamplerParams& p, const SamplerRow& row, const float* logits, u32 token, u64* room) {
  u32 broken;
  u64 best = best_key(logits, p.vocabulary, room, broken);
  if (broken != NO_TOKEN) return broken;
  float largest = logits[token_of(best)], sum = 0.0f;
  for (u32 i = threadIdx.x; i < p.vocabulary; i += SAMPLER_THREADS) sum += exp_of(logits[i] - largest);
  __syncthreads();
  float spread = log_of(block_sum<SAMPLER_THREADS>(sum, reinterpret_cast<float*>(room)));
  if (threadIdx.x == 0) {
    p.logprobs[blockIdx.x] = token < p.vocabulary ? (logits[token] - largest) - spread : FORBIDDEN;
  }
  u32 top = row.logprobs < p.top ? row.logprobs : p.top;
  for (u32 rank = 0; rank < top && best > 0; rank++) {
    u64 at = static_cast<u64>(blockIdx.x) * p.top + rank;
    if (threadIdx.x == 0) {
      p.top_ids[at] = token_of(best);
      p.top_logprobs[at] = (logits[token_of(best)] - largest) - spread;
    }
    u64 next = 0;
    for (u32 i = threadIdx.x; i < p.vocabulary; i += SAMPLER_THREADS) {
      u64 key = key_of(logits[i], i);
      if (key < best && key > next) next = key;
    }
    best = block_max(next, room);
  }
  return NO_TOKEN;
}

// grid: rows
__device__ inline void sample(const SamplerParams& p) {
  __shared__ u64 room[SAMPLER_THREADS / WARP];
  SamplerRow row = p.rows[blockIdx.x];
  const float* logits = p.logits + static_cast<u64>(blockIdx.x) * p.vocabulary;
  u32 token = row.known, broken = NO_TOKEN;
  if (token == NO_TOKEN) {
    const float* chosen_from = logits;
    if (row.shaped != NO_TOKEN) {
      float* shaped = p.shaped + static_cast<u64>(row.shaped) * p.vocabulary;
      shape(p, row, logits, shaped);
      chosen_from = shaped;
    }
    u64 best = best_key(chosen_from, p.vocabulary, room, broken);
    if (broken == NO_TOKEN) token = choose(p, row, chosen_from, best, room);
  }
  if (broken == NO_TOKEN && row.logprobs != NO_TOKEN) broken = score(p, row, logits, token, room);
  if (threadIdx.x > 0) return;
  p.ids[blockIdx.x] = broken == NO_TOKEN ? token : NO_TOKEN;
  if (broken != NO_TOKEN) p.logprobs[blockIdx.x] = from_bits(broken);
}

KERNEL(sample_f32, SAMPLER_THREADS, SamplerParams, sample)
