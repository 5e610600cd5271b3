// What stands behind the opaque handles of the C interface.
#pragma once

#include "abi.h"
#include "arena.h"
#include "thread_pool.h"

struct OctavoPool {
  explicit OctavoPool(int num_threads) : threads(num_threads) {}
  octavo::ThreadPool threads;
};

struct OctavoArena {
  octavo::Arena memory;
};
