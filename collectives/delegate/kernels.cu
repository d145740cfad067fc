// The device's side of a delegated collective, compiled at run time: no header, no toolkit.
//
// Operands and results cross the bus as words: 4 bytes of data under the number of the operation,
// written and read whole (see words.rs, of which this is the mirror). Every wait ends: with the
// words, with the word `stop`, or with the deadline by the device's own clock. Whoever gives up says
// so in `control`, and every later kernel of the group returns zeros at once.

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
enum { RANKS_MAX = 8 };

// One launch, put together from the scalars that a kernel is given.
struct Call {
  const u8* in;       // our operand
  u8* out;
  u64 in_bytes;
  u64 out_bytes;
  u64* up;            // the words that we write
  const u64* down;    // the words that we read: the proxy's, or the slot of rank 0
  u64 slot_words;     // from the slot of one rank to that of the next
  volatile u64* control;
  u64* state;
  u64 deadline_ns;
  u32 sequence;
  u32 operation;      // for the record of a wait that was given up
  u32 rank;
  u32 size;
};

__device__ u64 wide(u32 low, u32 high) {
  return (u64)high << 32 | low;
}

// The scalars that every kernel takes, in the order of `Call::scalars` in cuda.rs.
#define SCALARS                                                                                    \
  u32 up_low, u32 up_high, u32 down_low, u32 down_high, u32 control_low, u32 control_high,         \
      u32 state_low, u32 state_high, u32 in_bytes, u32 out_bytes, u32 slot_words,                  \
      u32 deadline_low, u32 deadline_high, u32 sequence, u32 operation, u32 rank, u32 size
#define CALL                                                                                       \
  {                                                                                                \
    in, out, in_bytes, out_bytes, (u64*)wide(up_low, up_high),                                     \
        (const u64*)wide(down_low, down_high), slot_words,                                         \
        (volatile u64*)wide(control_low, control_high), (u64*)wide(state_low, state_high),         \
        wide(deadline_low, deadline_high), sequence, operation, rank, size                         \
  }

__device__ u64 now() {
  u64 nanoseconds;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

__device__ void store_pair(u64* at, u64 a, u64 b) {
  asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(a), "l"(b) : "memory");
}

__device__ void load_pair(const u64* at, u64& a, u64& b) {
  asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at) : "memory");
}

// Four bytes of an operand of `bytes` bytes; past its end they are zeros. Slices of arrays may
// begin anywhere.
__device__ __noinline__ u32 load4(const u8* from, u64 at, u64 bytes) {
  if (at + 4 <= bytes && ((u64)(from + at) & 3) == 0) {
    return *(const u32*)(from + at);
  }
  u32 value = 0;
#pragma unroll 1
  for (u32 i = 0; i < 4 && at + i < bytes; ++i) {
    value |= (u32)from[at + i] << (8 * i);
  }
  return value;
}

__device__ __noinline__ void store4(u8* to, u64 at, u64 bytes, u32 value) {
  if (at + 4 <= bytes && ((u64)(to + at) & 3) == 0) {
    *(u32*)(to + at) = value;
    return;
  }
#pragma unroll 1
  for (u32 i = 0; i < 4 && at + i < bytes; ++i) {
    to[at + i] = (u8)(value >> (8 * i));
  }
}

// No bytes at all still take a pair: that the other side has arrived is news as well.
__device__ u64 pairs(u64 bytes) {
  return bytes == 0 ? 1 : (bytes + 7) / 8;
}

// Waits until both words at `at` are of this operation. Returns why it gave up, or 0.
__device__ u32 wait_pair(const Call& call, const u64* at, u64 begun, u64& a, u64& b) {
  for (u32 polls = 1;; ++polls) {
    load_pair(at, a, b);
    int ahead_a = (int)((u32)(a >> 32) - call.sequence);
    int ahead_b = (int)((u32)(b >> 32) - call.sequence);
    if (ahead_a == 0 && ahead_b == 0) {
      return 0;
    }
    if (ahead_a > 0 || ahead_b > 0) {
      return OVERRUN;
    }
    if (polls % 32 == 0) {
      if (call.control[STOP] != 0 || ((volatile u64*)call.state)[DEAD] != 0) {
        return STOPPED;
      }
      if (now() - begun > call.deadline_ns) {
        return LATE;
      }
    }
  }
}

// From here on every kernel of the group returns zeros at once.
__device__ void give_up(const Call& call, u32 rank, u32 why) {
  if (why != STOPPED) {
    call.control[GAVE_UP] =
        ((u64)call.sequence << 32) | (u64)(call.operation << 16 | rank << 8 | why);
  }
  ((volatile u64*)call.state)[DEAD] = 1;
}

__device__ void publish(const Call& call, u64 first, u64 stride) {
  u64 stamp = (u64)call.sequence << 32;
  for (u64 pair = first; pair < pairs(call.in_bytes); pair += stride) {
    u64 a = stamp | load4(call.in, 8 * pair, call.in_bytes);
    u64 b = stamp | load4(call.in, 8 * pair + 4, call.in_bytes);
    store_pair(call.up + 2 * pair, a, b);
  }
}

// To be asked before anything is published: a peer must not take what follows a failure for data.
__device__ bool dead(const Call& call) {
  return ((volatile u64*)call.state)[DEAD] != 0;
}

__device__ void zero(const Call& call, u64 first, u64 stride) {
  for (u64 pair = first; pair < pairs(call.out_bytes); pair += stride) {
    store4(call.out, 8 * pair, call.out_bytes, 0);
    store4(call.out, 8 * pair + 4, call.out_bytes, 0);
  }
}

// One thread speaks for the kernel: the threads of a collective wait for the same peers.
__device__ void note_waiting(const Call& call, u64 first, u64 begun) {
  if (first == 0) {
    call.state[WAITED_SO_FAR] += now() - begun;
    call.control[WAITED] = call.state[WAITED_SO_FAR];
  }
}

__device__ const u64* slot(const Call& call, u32 rank) {
  return call.down + call.slot_words * rank;
}

#ifdef WITH_PROXY
// Our operand goes up, the proxy's answer comes down.
extern "C" __global__ void offbook_with_proxy(
    const u8* in, const u32* token, u8* out, u32* next_token, SCALARS) {
  Call call = CALL;
  u64 begun = now();
  u64 first = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  u64 stride = gridDim.x * (u64)blockDim.x;
  if (dead(call)) {
    return zero(call, first, stride);
  }
  publish(call, first, stride);
  u32 why = 0;
  for (u64 pair = first; pair < pairs(call.out_bytes); pair += stride) {
    u64 a = 0, b = 0;
    if (why == 0) {
      why = wait_pair(call, call.down + 2 * pair, begun, a, b);
    }
    if (why != 0) {
      a = b = 0;
    }
    store4(call.out, 8 * pair, call.out_bytes, (u32)a);
    store4(call.out, 8 * pair + 4, call.out_bytes, (u32)b);
  }
  if (why != 0) {
    give_up(call, call.rank, why);
  }
  note_waiting(call, first, begun);
}
#endif

#ifdef WITH_PEERS_FOLD
__device__ float from_half(u32 bits) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"((u16)bits));
  return wide;
}

__device__ u32 to_half(float wide) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(wide));
  return bits;
}

__device__ float from_bfloat(u32 bits) {
  return __uint_as_float(bits << 16);
}

// To the nearest, ties to even; a NaN stays one.
__device__ u32 to_bfloat(float wide) {
  u32 bits = __float_as_uint(wide);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) {
    return (bits >> 16) | 0x40;
  }
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

__device__ float fold_float(float a, float b) {
  if (FOLD == SUM) {
    return a + b;
  }
  if (FOLD == MAX) {
    return a > b || a != a ? a : b;
  }
  return a < b || a != a ? a : b;
}

__device__ u32 fold_integer(u32 a, u32 b) {
  if (FOLD == SUM) {
    return a + b;
  }
  bool less = TYPE == I32 ? (int)a < (int)b : a < b;
  return (FOLD == MIN) == less ? a : b;
}

// Four bytes of one operand, or of the fold so far: one wide element or two narrow ones.
struct Folded {
  float low, high;
  u32 whole;
};

__device__ Folded unpack(u32 bits) {
  Folded folded = {0, 0, bits};
  if (TYPE == F32) {
    folded.low = __uint_as_float(bits);
  } else if (TYPE == F16) {
    folded.low = from_half(bits & 0xFFFF);
    folded.high = from_half(bits >> 16);
  } else if (TYPE == BF16) {
    folded.low = from_bfloat(bits & 0xFFFF);
    folded.high = from_bfloat(bits >> 16);
  }
  return folded;
}

__device__ Folded combine(Folded a, Folded b) {
  return {fold_float(a.low, b.low), fold_float(a.high, b.high), fold_integer(a.whole, b.whole)};
}

__device__ u32 pack(Folded folded) {
  if (TYPE == F32) {
    return __float_as_uint(folded.low);
  }
  if (TYPE == F16) {
    return to_half(folded.low) | to_half(folded.high) << 16;
  }
  if (TYPE == BF16) {
    return to_bfloat(folded.low) | to_bfloat(folded.high) << 16;
  }
  return folded.whole;
}

// Folds the operands of all ranks in rank order: the same bits everywhere.
__device__ u32 fold_pair(const Call& call, u64 pair, u64 begun, u32& whom) {
  Folded low, high;
#pragma unroll 1
  for (u32 rank = 0; rank < call.size; ++rank) {
    u64 a, b;
    if (rank == call.rank) {
      a = load4(call.in, 8 * pair, call.in_bytes);
      b = load4(call.in, 8 * pair + 4, call.in_bytes);
    } else {
      u32 why = wait_pair(call, slot(call, rank) + 2 * pair, begun, a, b);
      if (why != 0) {
        whom = rank;
        return why;
      }
    }
    Folded next_low = unpack((u32)a), next_high = unpack((u32)b);
    low = rank == 0 ? next_low : combine(low, next_low);
    high = rank == 0 ? next_high : combine(high, next_high);
  }
  store4(call.out, 8 * pair, call.out_bytes, pack(low));
  store4(call.out, 8 * pair + 4, call.out_bytes, pack(high));
  return 0;
}
#endif

// The devices of one host exchange by themselves. Each rank has two slots and uses them in turn;
// nobody ends an operation before all have arrived in it, so that a slot is written again only when
// every peer has read it.
#ifdef WITH_PEERS_FOLD
extern "C" __global__ void offbook_fold_peers(
    const u8* in, const u32* token, u8* out, u32* next_token, SCALARS) {
  Call call = CALL;
  u64 begun = now();
  u64 first = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  u64 stride = gridDim.x * (u64)blockDim.x;
  if (dead(call)) {
    return zero(call, first, stride);
  }
  publish(call, first, stride);
  u32 why = 0, whom = 0;
  for (u64 pair = first; pair < pairs(call.out_bytes) && why == 0; pair += stride) {
    why = fold_pair(call, pair, begun, whom);
  }
  if (why != 0) {
    give_up(call, whom, why);
  }
  note_waiting(call, first, begun);
}
#endif

// What rank r shows are `bytes_r`, wanted at `offset_r`; 0 of them are not wanted here.
#ifdef WITH_PEERS_COPY
extern "C" __global__ void offbook_copy_peers(
    const u8* in, const u32* token, u8* out, u32* next_token, SCALARS,
    u32 offset_0, u32 bytes_0, u32 offset_1, u32 bytes_1, u32 offset_2, u32 bytes_2,
    u32 offset_3, u32 bytes_3, u32 offset_4, u32 bytes_4, u32 offset_5, u32 bytes_5,
    u32 offset_6, u32 bytes_6, u32 offset_7, u32 bytes_7) {
  Call call = CALL;
  u32 offsets[RANKS_MAX] = {
      offset_0, offset_1, offset_2, offset_3, offset_4, offset_5, offset_6, offset_7};
  u32 lengths[RANKS_MAX] = {
      bytes_0, bytes_1, bytes_2, bytes_3, bytes_4, bytes_5, bytes_6, bytes_7};
  u64 begun = now();
  u64 first = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  u64 stride = gridDim.x * (u64)blockDim.x;
  if (dead(call)) {
    return zero(call, first, stride);
  }
  publish(call, first, stride);
  u32 why = 0, whom = 0;
#pragma unroll 1
  for (u32 rank = 0; rank < call.size; ++rank) {
    u64 bytes = lengths[rank];
    u8* to = call.out + offsets[rank];
    for (u64 pair = first; bytes != 0 && pair < pairs(bytes) && why == 0; pair += stride) {
      u64 a, b;
      if (rank == call.rank) {
        a = load4(call.in, 8 * pair, call.in_bytes);
        b = load4(call.in, 8 * pair + 4, call.in_bytes);
      } else {
        why = wait_pair(call, slot(call, rank) + 2 * pair, begun, a, b);
        whom = rank;
      }
      if (why == 0) {
        store4(to, 8 * pair, bytes, (u32)a);
        store4(to, 8 * pair + 4, bytes, (u32)b);
      }
    }
  }
  // Arrival of all, also of those whose bytes are not wanted.
  if (first < call.size && first != call.rank && why == 0) {
    u64 a, b;
    why = wait_pair(call, slot(call, (u32)first), begun, a, b);
    whom = (u32)first;
  }
  if (why != 0) {
    give_up(call, whom, why);
  }
  note_waiting(call, first, begun);
}
#endif
