// The device's side of a delegated collective, compiled at run time: no header, no toolkit.
//
// Operands and results cross the bus as words: 4 bytes of data under the number of the operation,
// written and read whole (see words.rs, of which this is the mirror). Every wait ends: with the
// words, with the word `stop`, or with the deadline by the device's own clock. Whoever gives up says
// so in `control`, and every later kernel of the group returns zeros at once.
//
// MLX hashes the compiled text at every launch, so each kernel is a compilation of its own, and
// holds what its operation needs and nothing more:
//   WITH_PROXY            the operand goes up, the proxy's answer comes down
//   FOLD_PEERS            devices of one host fold each other's operands; FOLD and TYPE say how
//   COPY_PEERS            devices of one host lay each other's operands side by side
//   SMALL                 one pair of words for each thread, and operands are whole pairs

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The same numbers stand in cuda.rs.
enum { STOP = 0, GAVE_UP = 8, WAITED = 16 };        // in `control`, words on cache lines of their own
enum { DEAD = 0, WAITED_SO_FAR = 1 };               // in `state`, on the device
enum { STOPPED = 1, LATE = 2, OVERRUN = 3 };        // why a wait was given up
enum { SUM = 0, MAX = 1, MIN = 2 };                 // FOLD: how operands become one
enum { F32 = 0, F16 = 1, BF16 = 2, I32 = 3, U32 = 4 };  // TYPE of their elements

// The scalars that every kernel takes, in the order in which cuda.rs gives them.
#define SCALARS                                                                                    \
  u32 control_low, u32 control_high, u32 state_low, u32 state_high, u32 in_bytes, u32 out_bytes,   \
      u32 deadline_us, u32 sequence, u32 who

struct Wait {
  volatile u64* control;
  volatile u64* state;
  u64 begun;
  u32 deadline_us;
  u32 sequence;
  u32 who;  // operation, own rank, number of ranks: 16, 8 and 8 bits
};

#define WAIT                                                                                       \
  {                                                                                                \
    (volatile u64*)wide(control_low, control_high), (volatile u64*)wide(state_low, state_high),    \
        now(), deadline_us, sequence, who                                                          \
  }

#ifdef SMALL
#define EACH_PAIR(pair, bytes) if (u32 pair = first; pair < pairs(bytes))
#else
#define EACH_PAIR(pair, bytes)                                                                     \
  for (u32 pair = first; pair < pairs(bytes); pair += gridDim.x * blockDim.x)
#endif

__device__ u64 wide(u32 low, u32 high) {
  return (u64)high << 32 | low;
}

__device__ u64 now() {
  u64 nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

// No bytes at all still take a pair: that the other side has arrived is news as well.
__device__ u32 pairs(u32 bytes) {
#ifdef SMALL
  return bytes / 8;
#else
  return bytes == 0 ? 1 : (bytes + 7) / 8;
#endif
}

// Eight bytes of an operand. It may begin anywhere, as slices of arrays do; past its end are zeros.
__device__ uint2 load(const u8* from, u32 pair, u32 bytes) {
  const u8* at = from + 8 * (u64)pair;
#ifdef SMALL
  bool whole = true;
#else
  bool whole = 8 * pair + 8 <= bytes;
#endif
  if (whole && ((u64)at & 7) == 0) {
    return *(const uint2*)at;
  }
  u64 value = 0;
#pragma unroll 1
  for (u32 i = 0; i < 8 && (whole || 8 * pair + i < bytes); ++i) {
    value |= (u64)at[i] << (8 * i);
  }
  return {(u32)value, (u32)(value >> 32)};
}

// Results are arrays of their own, which begin where they should; parts of one may not.
__device__ void store(u8* to, u32 pair, u32 bytes, uint2 data) {
  u8* at = to + 8 * (u64)pair;
#ifdef SMALL
  *(uint2*)at = data;
#else
  if (8 * pair + 8 <= bytes && ((u64)at & 7) == 0) {
    *(uint2*)at = data;
    return;
  }
  u64 value = wide(data.x, data.y);
#pragma unroll 1
  for (u32 i = 0; i < 8 && 8 * pair + i < bytes; ++i) {
    at[i] = (u8)(value >> (8 * i));
  }
#endif
}

__device__ void publish(const Wait& wait, u64* up, u32 pair, uint2 data) {
  u64 stamp = (u64)wait.sequence << 32;
  asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(up + 2 * (u64)pair),
               "l"(stamp | data.x), "l"(stamp | data.y)
               : "memory");
}

// Waits until both words of a pair are of this operation. Returns why it gave up, or 0.
__device__ u32 await(const Wait& wait, const u64* down, u32 pair, uint2& data) {
#pragma unroll 1
  for (u32 polls = 1;; ++polls) {
    u64 a, b;
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(a), "=l"(b)
                 : "l"(down + 2 * (u64)pair)
                 : "memory");
    int ahead_a = (int)((u32)(a >> 32) - wait.sequence);
    int ahead_b = (int)((u32)(b >> 32) - wait.sequence);
    if ((ahead_a | ahead_b) == 0) {
      data = {(u32)a, (u32)b};
      return 0;
    }
    if (ahead_a > 0 || ahead_b > 0) {
      return OVERRUN;
    }
    if (polls % 32 == 0) {
      if ((wait.control[STOP] | wait.state[DEAD]) != 0) {
        return STOPPED;
      }
      if (now() - wait.begun > 1000 * (u64)wait.deadline_us) {
        return LATE;
      }
    }
  }
}

// From here on every kernel of the group returns zeros at once.
__device__ void give_up(const Wait& wait, u32 rank, u32 why) {
  if (why != STOPPED) {
    u32 what = (wait.who & 0xFFFF0000) | rank << 8 | why;
    wait.control[GAVE_UP] = (u64)wait.sequence << 32 | what;
  }
  wait.state[DEAD] = 1;
}

// One thread speaks for the kernel: the threads of a collective wait for the same peers.
__device__ void note_waiting(const Wait& wait, u32 first) {
  if (first == 0) {
    u64 waited = wait.state[WAITED_SO_FAR] + now() - wait.begun;
    wait.state[WAITED_SO_FAR] = waited;
    wait.control[WAITED] = waited;
  }
}

#ifdef WITH_PROXY
extern "C" __global__ void offbook(
    const u8* in, const u32* token, u8* out, u32* next_token, SCALARS) {
  Wait wait = WAIT;
  u64* up = (u64*)wait.control + CONTROL_WORDS;
  const u64* down = up + AREA_WORDS;
  u32 first = blockIdx.x * blockDim.x + threadIdx.x;
  // To be asked before anything is published: a peer must not take what follows a failure for data.
  u32 why = wait.state[DEAD] != 0 ? STOPPED : 0;
  if (why == 0) {
    EACH_PAIR(pair, in_bytes) publish(wait, up, pair, load(in, pair, in_bytes));
  }
  EACH_PAIR(pair, out_bytes) {
    uint2 data = {0, 0};
    if (why == 0) {
      why = await(wait, down, pair, data);
    }
    store(out, pair, out_bytes, data);
  }
  if (why != 0) {
    give_up(wait, who >> 8 & 0xFF, why);
  }
  note_waiting(wait, first);
}
#endif

// Between peers each rank has two slots and uses them in turn. Nobody ends an operation before all
// have arrived in it, so that a slot is written again only when every peer has read it.

#ifdef FOLD_PEERS
__device__ float widened(u32 bits) {
  if (TYPE == F16) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((u16)bits));
    return wide;
  }
  return __uint_as_float(bits << 16);
}

// To the nearest, ties to even; a NaN stays one.
__device__ u32 narrowed(float wide) {
  if (TYPE == F16) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(wide));
    return bits;
  }
  u32 bits = __float_as_uint(wide);
  u32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return wide != wide ? bits >> 16 | 0x40 : rounded;
}

__device__ float folded(float a, float b) {
  if (FOLD == SUM) {
    return a + b;
  }
  return (FOLD == MAX ? a > b : a < b) || a != a ? a : b;
}

// Four bytes of the fold so far: one wide element, or two narrow ones as they are added.
struct Folded {
  float low, high;
  u32 whole;
};

__device__ void fold(Folded& so_far, u32 bits, bool is_first) {
  if (TYPE == I32 || TYPE == U32) {
    u32 a = so_far.whole;
    bool less = TYPE == I32 ? (int)a < (int)bits : a < bits;
    u32 both = FOLD == SUM ? a + bits : ((FOLD == MIN) == less ? a : bits);
    so_far.whole = is_first ? bits : both;
  } else if (TYPE == F32) {
    float next = __uint_as_float(bits);
    so_far.low = is_first ? next : folded(so_far.low, next);
  } else {
    float low = widened(bits & 0xFFFF), high = widened(bits >> 16);
    so_far.low = is_first ? low : folded(so_far.low, low);
    so_far.high = is_first ? high : folded(so_far.high, high);
  }
}

__device__ u32 result(const Folded& folded) {
  if (TYPE == I32 || TYPE == U32) {
    return folded.whole;
  }
  return TYPE == F32 ? __float_as_uint(folded.low)
                     : narrowed(folded.low) | narrowed(folded.high) << 16;
}

extern "C" __global__ void offbook(
    const u8* in, const u32* token, u8* out, u32* next_token, SCALARS,
    u32 slots_low, u32 slots_high, u32 slot_words) {
  Wait wait = WAIT;
  u64* slots = (u64*)wide(slots_low, slots_high);
  u32 rank = who >> 8 & 0xFF, size = who & 0xFF;
  u32 first = blockIdx.x * blockDim.x + threadIdx.x;
  u32 why = wait.state[DEAD] != 0 ? STOPPED : 0, whom = 0;
  if (why == 0) {
    EACH_PAIR(pair, in_bytes) {
      publish(wait, slots + (u64)slot_words * rank, pair, load(in, pair, in_bytes));
    }
  }
  EACH_PAIR(pair, out_bytes) {
    Folded low = {0, 0, 0}, high = {0, 0, 0};
    // In rank order: the same bits on every rank.
#pragma unroll 1
    for (u32 from = 0; from < size && why == 0; ++from) {
      uint2 data;
      if (from == rank) {
        data = load(in, pair, in_bytes);
      } else {
        why = await(wait, slots + (u64)slot_words * from, pair, data);
        whom = from;
      }
      fold(low, data.x, from == 0);
      fold(high, data.y, from == 0);
    }
    store(out, pair, out_bytes, why == 0 ? uint2{result(low), result(high)} : uint2{0, 0});
  }
  if (why != 0) {
    give_up(wait, whom, why);
  }
  note_waiting(wait, first);
}
#endif

#ifdef COPY_PEERS
// Rank r shows `bytes_r` of which this rank wants all at `offset_r`, or none when they are 0.
extern "C" __global__ void offbook(
    const u8* in, const u32* token, u8* out, u32* next_token, SCALARS,
    u32 slots_low, u32 slots_high, u32 slot_words,
    u32 offset_0, u32 bytes_0, u32 offset_1, u32 bytes_1, u32 offset_2, u32 bytes_2,
    u32 offset_3, u32 bytes_3, u32 offset_4, u32 bytes_4, u32 offset_5, u32 bytes_5,
    u32 offset_6, u32 bytes_6, u32 offset_7, u32 bytes_7) {
  Wait wait = WAIT;
  u64* slots = (u64*)wide(slots_low, slots_high);
  u32 rank = who >> 8 & 0xFF, size = who & 0xFF;
  u32 offsets[8] = {
      offset_0, offset_1, offset_2, offset_3, offset_4, offset_5, offset_6, offset_7};
  u32 lengths[8] = {bytes_0, bytes_1, bytes_2, bytes_3, bytes_4, bytes_5, bytes_6, bytes_7};
  u32 first = blockIdx.x * blockDim.x + threadIdx.x;
  u32 why = wait.state[DEAD] != 0 ? STOPPED : 0, whom = 0;
  if (why == 0) {
    EACH_PAIR(pair, in_bytes) {
      publish(wait, slots + (u64)slot_words * rank, pair, load(in, pair, in_bytes));
    }
  }
#pragma unroll 1
  for (u32 from = 0; from < size; ++from) {
    u32 bytes = lengths[from];
    const u64* shown = slots + (u64)slot_words * from;
    EACH_PAIR(pair, bytes) {
      uint2 data = {0, 0};
      if (from == rank) {
        data = load(in, pair, in_bytes);
      } else if (why == 0) {
        // Also when nothing is wanted: a pair says that the peer has arrived.
        why = await(wait, shown, pair, data);
        whom = from;
      }
      store(out + offsets[from], pair, bytes, why == 0 ? data : uint2{0, 0});
    }
  }
  if (why != 0) {
    give_up(wait, whom, why);
  }
  note_waiting(wait, first);
}
#endif
