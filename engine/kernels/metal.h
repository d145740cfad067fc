// What the bodies of our kernels are written in, as Metal has it. cuda.h has the same names. MLX declares
// the attributes that stand in a body, so these are put before each body and not into its header.
//
// NOT YET RUN: the machines it was written on have no Metal. A shard compares every kernel with MLX's
// own operations when it loads a model, and goes without them where they differ; `offbook doctor` says so.
const unsigned BLOCK_X = threadgroup_position_in_grid.x;
const unsigned BLOCK_Y = threadgroup_position_in_grid.y;
const unsigned THREAD = thread_position_in_threadgroup.x;
const unsigned LANE = THREAD % 32;
const unsigned WARP = THREAD / 32;
#define SHARED threadgroup
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
