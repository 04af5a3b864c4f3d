// The device layer of csrc/cuda/device.cuh on the host: the kernels' own sources run under it, and
// what a GPU would do by chance it does by intent.
//
// Threads are fibers. The collectives of a warp, a block and a cluster are rendezvous that check
// their operands. Priorities are adversarial: for a while whole warps, or blocks, or nobody in
// particular, get no turn while others can go on. Messages (send), copies (copy_async), wgmma's
// results and relaxed stores come as late, and in as strange an order, as they may. Shared memory
// starts as NaNs. What must not happen ends the run with a message that names it: diverging
// collectives, misaligned or foreign addresses, barriers before their initialisation or with too
// many arrivals, results read early (they are not there), deadlock, livelock.
//
// Not simulated: time, and what weak memory does to plain loads and stores between synchronising
// operations.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define RNNKERN_DEV inline
#define RNNKERN_UNROLL

namespace rnnkern::cuda {
namespace simulator {

// Global memory that a kernel may read, or write.
struct Memory {
  const void* begin;
  size_t bytes;
  bool writable;
};

struct Launch {
  int grid_x = 1, grid_y = 1;  // blocks
  int cluster = 1;             // blocks of one, along x
  int threads = 32;            // of a block
  int shared = 0;              // bytes of a block
  bool cooperative = false;    // all blocks are alive at once, not only a cluster's
  std::vector<Memory> memory;  // all that the kernel may touch; empty: not checked
};

struct Block;

struct Copy {
  uint32_t to;
  const void* from;
  int bytes, size;  // size: of these, that are read
  int64_t group;
};

struct Fiber {
  ucontext_t begin;
  jmp_buf here;
  bool started = false;
  int thread = 0;
  Block* block = nullptr;
  const char* waits_for = nullptr;
  std::vector<Copy> copies;
  int64_t group = 0;              // of copies, that is open
  bool fenced_for_wgmma = false;  // since it last waited for messages
};

// Where fibers wait for each other. operands: by lane, of a warp's.
struct Meeting {
  const char* what = nullptr;
  std::vector<Fiber*> waiting;
  void* operands[32];
};

// A transaction barrier, as PTX describes "mbarrier".
struct Barrier {
  Barrier(uint32_t address, int arrivals)
      : address(address), arrivals(arrivals), pending(arrivals) {}
  uint32_t address;
  int arrivals, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool published = false;  // for others in the cluster
  std::vector<Fiber*> waiting;
};

// A warp's part of a product under way: 16 rows of d.
struct Product {
  int columns;
  bool bfloat16, add, committed;
  uint64_t b;
  uint32_t a[32][4];
  float* d[32];
};

struct Warp {
  Meeting meeting;
  std::vector<Product> products;
  bool fenced = false;  // wgmma_fence
  size_t issued = 0;    // products so far
};

struct Cluster {
  Meeting meeting;
  std::vector<Block*> blocks;
  int x = 0;
};

struct Block {
  int x, y, rank, index;  // index: among those alive
  Cluster* cluster;
  int threads_left;
  std::vector<unsigned char> shared;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<std::vector<uint64_t>> wgmma_operands;  // by warpgroup: b of each product so far
  std::vector<Barrier> barriers;
};

struct Message {
  Block* to;
  uint32_t address, barrier;
  uint32_t words[4];
};

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint32_t operator()() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
  }
  uint32_t below(size_t n) { return (*this)() % static_cast<uint32_t>(n); }
  bool one_in(uint32_t n) { return below(n) == 0; }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[below(i)]);
  }

 private:
  uint64_t state_;
};

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// Who can go on, by warp, and who goes first. (Probabilistic concurrency testing: priorities that
// hold for a while find what a fair choice each time does not.)
class Turns {
 public:
  void reset(int blocks, int warps, uint32_t manner) {
    warps_ = warps;
    manner_ = manner;
    ready_.assign(blocks * warps, {});
    order_.resize(blocks * warps);
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = i;
    count_ = left_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void add(Fiber* fiber) {
    ready_[fiber->block->index * warps_ + fiber->thread / 32].push_back(fiber);
    ++count_;
  }
  Fiber* take(Random& random) {
    if (left_-- == 0) {
      left_ = 50 + random.below(5000);
      reorder(random);
    }
    size_t i = 0;
    if (manner_ == 2) {
      do i = random.below(ready_.size());
      while (ready_[i].empty());
    } else {
      while (ready_[order_[i]].empty()) ++i;
      i = order_[i];
    }
    std::swap(ready_[i][random.below(ready_[i].size())], ready_[i].back());
    Fiber* fiber = ready_[i].back();
    ready_[i].pop_back();
    --count_;
    return fiber;
  }

 private:
  void reorder(Random& random) {
    if (manner_ == 0) random.shuffle(order_);
    if (manner_ != 1) return;
    std::vector<size_t> blocks(ready_.size() / warps_);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    random.shuffle(blocks);
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = blocks[i / warps_] * warps_ + i % warps_;
  }

  int warps_ = 1, left_ = 0;
  uint32_t manner_ = 0;  // 0: by warps, 1: by blocks, 2: no priorities
  size_t count_ = 0;
  std::vector<std::vector<Fiber*>> ready_;
  std::vector<size_t> order_;
};

struct World {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  Random random;
  Turns turns;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::string error;
  int alive = 0;       // fibers
  uint32_t haste = 0;  // of messages, in percent
  std::vector<Message> messages;
  std::map<uint32_t*, uint32_t> stores;  // relaxed ones that nobody sees yet
  std::vector<Fiber*> spinning;
  int64_t progress = 0;
  std::vector<std::unique_ptr<char[]>> stacks;
};
inline World world;

constexpr size_t kStackBytes = 128 << 10;
constexpr uint32_t kSharedBase = 1024;  // rank r's address of the cluster is this + ((r + 1) << 24)

// ---- fibers ----

inline void wake(Fiber* fiber) { world.turns.add(fiber); }
inline void wake_all(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) wake(fiber);
  fibers.clear();
  ++world.progress;
}

// To the scheduler, until somebody wakes the fiber.
__attribute__((noinline)) inline void sleep(const char* waits_for) {
  world.current->waits_for = waits_for;
  if (!_setjmp(world.current->here)) _longjmp(world.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber* fiber) {
  world.current = fiber;
  if (_setjmp(world.scheduler)) return;
  if (fiber->started) _longjmp(fiber->here, 1);
  fiber->started = true;
  setcontext(&fiber->begin);
}

inline void fiber_main() {
  try {
    (*world.body)();
  } catch (const std::exception& e) {
    if (world.error.empty()) {
      const Block& block = *world.current->block;
      world.error = std::string(e.what()) + " (block " + std::to_string(block.x) + ", " +
                    std::to_string(block.y) + ", thread " + std::to_string(world.current->thread) +
                    ")";
    }
  }
  --world.current->block->threads_left;
  --world.alive;
  _longjmp(world.scheduler, 1);
}

inline void prepare(Fiber& fiber, char* stack) {
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = stack;
  fiber.begin.uc_stack.ss_size = kStackBytes;
  fiber.begin.uc_link = nullptr;
  makecontext(&fiber.begin, fiber_main, 0);
}

// Somebody else's turn, perhaps: anywhere between two accesses.
inline void perhaps_later() {
  if (world.current && world.random.one_in(512)) {
    wake(world.current);
    sleep("its turn");
  }
}

template <class Act>
void meet(Meeting& meeting, size_t all, const char* what, Act act) {
  if (meeting.waiting.empty()) {
    meeting.what = what;
  } else if (std::strcmp(meeting.what, what)) {
    fail(std::string("diverging collectives: ") + meeting.what + " and " + what);
  }
  meeting.waiting.push_back(world.current);
  if (meeting.waiting.size() == all) {
    act();
    wake_all(meeting.waiting);
  }
  sleep(what);
}

inline Block& block() { return *world.current->block; }
inline Warp& warp() { return block().warps[world.current->thread / 32]; }

// act(operands by lane), once all lanes are there.
template <class Operands, class Act>
void meet_in_warp(const char* what, Operands& operands, Act act) {
  Meeting& meeting = warp().meeting;
  meeting.operands[world.current->thread % 32] = &operands;
  meet(meeting, 32, what, [&] { act(reinterpret_cast<Operands**>(meeting.operands)); });
}

// ---- memory ----

inline unsigned char* shared_at(Block& block, uint32_t address, uint32_t bytes) {
  if (address >> 24) fail("a cluster address where one of the own shared memory belongs");
  if (address % bytes) fail("misaligned in shared memory");
  if (address < kSharedBase || address - kSharedBase + bytes > block.shared.size()) {
    fail("out of bounds of shared memory");
  }
  return block.shared.data() + (address - kSharedBase);
}

inline void read_shared(uint32_t address, void* to, uint32_t bytes) {
  perhaps_later();
  std::memcpy(to, shared_at(block(), address, bytes), bytes);
}

inline void write_shared(Block& block, uint32_t address, const void* from, uint32_t bytes) {
  unsigned char* to = shared_at(block, address, bytes);
  for (const Barrier& barrier : block.barriers) {
    if (address < barrier.address + 8 && barrier.address < address + bytes) {
      fail("a barrier overwritten");
    }
  }
  std::memcpy(to, from, bytes);
}

inline void write_shared(uint32_t address, const void* from, uint32_t bytes) {
  perhaps_later();
  write_shared(block(), address, from, bytes);
}

enum class Access { kRead, kWrite, kExchange };  // kExchange: what other blocks access meanwhile

inline void check_global(const void* at, size_t bytes, Access access) {
  const char* p = static_cast<const char*>(at);
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned in global memory");
  if (world.launch->memory.empty()) return;
  for (const Memory& memory : world.launch->memory) {
    const char* begin = static_cast<const char*>(memory.begin);
    if (p < begin || p + bytes > begin + memory.bytes) continue;
    if (access == Access::kRead && memory.writable) fail("plain read of memory that is written");
    if (access != Access::kRead && !memory.writable) fail("write to memory that is read");
    return;
  }
  fail("out of bounds of global memory");
}

template <class T>
T read_global(const void* from) {
  check_global(from, sizeof(T), Access::kRead);
  T v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
void write_global(void* to, const T& v) {
  check_global(to, sizeof v, Access::kWrite);
  std::memcpy(to, &v, sizeof v);
}

// Lets others see one relaxed store, any.
inline void publish_store() {
  auto& stores = world.stores;
  if (stores.empty()) return;
  const size_t span = stores.rbegin()->first - stores.begin()->first + 1;
  const auto it = stores.lower_bound(stores.begin()->first + world.random() % span);
  *it->first = it->second;
  stores.erase(it);
  ++world.progress;
}

inline void complete(const Copy& copy) {
  unsigned char bytes[16] = {};
  std::memcpy(bytes, copy.from, copy.size);
  write_shared(block(), copy.to, bytes, copy.bytes);
}

inline void start_copy(uint32_t to, const void* from, int bytes, int size) {
  shared_at(block(), to, bytes);
  world.current->copies.push_back({to, from, bytes, size, world.current->group});
}

// Copies of groups before this; of others some.
inline void complete_copies(int64_t before) {
  auto& copies = world.current->copies;
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].group < before || world.random.one_in(8)) {
      complete(copies[i]);
      copies[i] = copies.back();
      copies.pop_back();
    } else {
      ++i;
    }
  }
}

// ---- barriers and messages ----

inline Barrier& barrier_at(Block& block, uint32_t address) {
  for (Barrier& barrier : block.barriers) {
    if (barrier.address == address) return barrier;
  }
  fail("a barrier before its initialisation");
}

inline void check_phase(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    wake_all(barrier.waiting);
  }
}

inline void deliver_message() {
  auto& messages = world.messages;
  std::swap(messages[world.random.below(messages.size())], messages.back());
  const Message message = messages.back();
  messages.pop_back();
  if (message.to->threads_left == 0) fail("a message to a block that has left");
  Barrier& barrier = barrier_at(*message.to, message.barrier);
  if (!barrier.published) fail("a message to a barrier whose initialisation is not published");
  write_shared(*message.to, message.address, message.words, 16);
  barrier.bytes -= 16;
  if (barrier.bytes < -(1 << 20)) fail("a barrier's byte count underflows");
  ++world.progress;
  check_phase(barrier);
}

// ---- the scheduler ----

inline std::string who_waits(const std::vector<Fiber>& fibers) {
  std::string text;
  std::map<std::string, int> counts;
  for (const Fiber& fiber : fibers) {
    if (fiber.waits_for) ++counts[fiber.waits_for];
  }
  for (const auto& [what, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " for " + what;
  }
  return text;
}

// Runs blocks of these clusters to their end.
inline void run_clusters(const Launch& launch, const std::vector<int>& numbers) {
  const int warps = launch.threads / 32, size = launch.cluster;
  const int clusters_x = launch.grid_x / size;
  std::vector<Cluster> clusters(numbers.size());
  std::vector<Block> blocks(numbers.size() * size);
  std::vector<Fiber> fibers(blocks.size() * launch.threads);
  world.turns.reset(static_cast<int>(blocks.size()), warps, world.random.below(3));
  world.messages.clear();
  world.spinning.clear();
  world.alive = static_cast<int>(fibers.size());
  while (world.stacks.size() < fibers.size()) world.stacks.emplace_back(new char[kStackBytes]);

  for (size_t i = 0; i < blocks.size(); ++i) {
    Block& block = blocks[i];
    Cluster& cluster = clusters[i / size];
    cluster.x = numbers[i / size] % clusters_x;
    cluster.blocks.push_back(&block);
    block.rank = static_cast<int>(i) % size;
    block.index = static_cast<int>(i);
    block.x = cluster.x * size + block.rank;
    block.y = numbers[i / size] / clusters_x;
    block.cluster = &cluster;
    block.threads_left = launch.threads;
    block.shared.assign(launch.shared, 0xff);
    block.warps.resize(warps);
    block.wgmma_operands.resize((warps + 3) / 4);
    for (int t = 0; t < launch.threads; ++t) {
      const size_t number = i * launch.threads + t;
      Fiber& fiber = fibers[number];
      fiber.thread = t;
      fiber.block = &block;
      prepare(fiber, world.stacks[number].get());
      wake(&fiber);
    }
  }

  int idle = 0;  // rounds in which spinning threads saw nothing new
  int64_t seen = world.progress;
  while (world.alive > 0) {
    const bool none = world.turns.empty();
    if (!world.messages.empty() && (none || world.random.below(100) < world.haste)) {
      deliver_message();
      continue;
    }
    if (!world.spinning.empty() && (none || world.random.one_in(4096))) {
      for (int i = 0; i < 40; ++i) publish_store();
      if (none) {
        idle = world.progress == seen ? idle + 1 : 0;
        seen = world.progress;
        if (idle > 3) fail("livelock: threads spin, and nothing can change");
      }
      for (Fiber* fiber : world.spinning) wake(fiber);
      world.spinning.clear();
      continue;
    }
    if (none) fail("deadlock: threads wait, " + who_waits(fibers));
    Fiber* fiber = world.turns.take(world.random);
    fiber->waits_for = nullptr;
    resume(fiber);
    if (!world.error.empty()) fail(world.error);
  }
  world.current = nullptr;
  if (!world.messages.empty()) fail("messages under way when all had left");
  for (const Block& block : blocks) {
    for (const Warp& warp : block.warps) {
      if (!warp.products.empty()) fail("wgmma under way when its warp left");
    }
  }
}

// Runs a kernel on all blocks of a launch; returns what went wrong, or "".
inline std::string simulate(const Launch& launch, unsigned seed,
                            const std::function<void()>& body) {
  world.launch = &launch;
  world.body = &body;
  world.random = Random(seed);
  world.haste = world.random.below(101);
  world.error.clear();
  world.stores.clear();
  if (launch.threads % 32 || launch.grid_x % launch.cluster) return "an impossible launch";
  std::vector<int> order(launch.grid_x / launch.cluster * launch.grid_y);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  try {
    world.random.shuffle(order);
    if (launch.cooperative) {
      run_clusters(launch, order);
    } else {
      for (const int number : order) run_clusters(launch, {number});
    }
  } catch (const std::exception& e) {
    world.current = nullptr;
    return e.what();
  }
  while (!world.stores.empty()) publish_store();
  return "";
}

}  // namespace simulator

// ---- where a thread is ----

inline int thread() { return simulator::world.current->thread; }
inline int block_x() { return simulator::block().x; }
inline int block_y() { return simulator::block().y; }
inline int blocks_x() { return simulator::world.launch->grid_x; }
inline uint32_t cluster_rank() { return simulator::block().rank; }
inline uint32_t cluster_x() { return simulator::block().cluster->x; }

// ---- shared memory ----

inline uint32_t shared_base() { return simulator::kSharedBase; }
inline uint32_t shared_of(uint32_t address, uint32_t rank) {
  if (rank >= simulator::block().cluster->blocks.size()) simulator::fail("no such rank");
  return address | (rank + 1) << 24;
}

struct Words2 {
  uint32_t x, y;
};
struct Words4 {
  uint32_t x, y, z, w;
};

inline uint32_t load_shared(uint32_t a) {
  uint32_t v;
  simulator::read_shared(a, &v, sizeof v);
  return v;
}
inline Words2 load_shared2(uint32_t a) {
  Words2 v;
  simulator::read_shared(a, &v, sizeof v);
  return v;
}
inline Words4 load_shared4(uint32_t a) {
  Words4 v;
  simulator::read_shared(a, &v, sizeof v);
  return v;
}
inline void store_shared(uint32_t a, uint32_t v) { simulator::write_shared(a, &v, sizeof v); }
inline void store_shared4(uint32_t a, Words4 v) { simulator::write_shared(a, &v, sizeof v); }

// ---- global memory ----

inline uint16_t load_global16(const void* p) { return simulator::read_global<uint16_t>(p); }
inline uint32_t load_global(const void* p) { return simulator::read_global<uint32_t>(p); }
inline Words2 load_global2(const void* p) { return simulator::read_global<Words2>(p); }
inline Words4 load_global4(const void* p) { return simulator::read_global<Words4>(p); }
inline int64_t load_global64(const int64_t* p) { return simulator::read_global<int64_t>(p); }
inline void store_global(void* p, uint32_t v) { simulator::write_global(p, v); }
inline void store_global2(void* p, Words2 v) { simulator::write_global(p, v); }
inline void store_global4(void* p, Words4 v) { simulator::write_global(p, v); }

// The words of a vector may be of different ages.
inline Words4 load_relaxed4(const void* p) {
  simulator::check_global(p, 16, simulator::Access::kExchange);
  simulator::perhaps_later();
  uint32_t v[4];
  for (int i = 0; i < 4; ++i) {
    if (simulator::world.random.one_in(4)) simulator::publish_store();
    std::memcpy(&v[i], static_cast<const uint32_t*>(p) + i, 4);
  }
  return {v[0], v[1], v[2], v[3]};
}
inline void store_relaxed(void* p, uint32_t v) {
  simulator::check_global(p, 4, simulator::Access::kExchange);
  simulator::world.stores[static_cast<uint32_t*>(p)] = v;
}
inline void spin() {
  simulator::world.spinning.push_back(simulator::world.current);
  simulator::sleep("a word that is not there");
}

template <int bytes>
inline void copy_async(uint32_t to, const void* from) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simulator::check_global(from, bytes, simulator::Access::kRead);
  simulator::start_copy(to, from, bytes, bytes);
}
inline void copy_async_part(uint32_t to, const void* from, int size) {
  if (size < 0 || size > 4) simulator::fail("a part of 4 bytes that is none");
  if (reinterpret_cast<uintptr_t>(from) % 4) simulator::fail("misaligned in global memory");
  const char* p = static_cast<const char*>(from);
  for (int i = 0; i < size; ++i) simulator::check_global(p + i, 1, simulator::Access::kRead);
  simulator::start_copy(to, from, 4, size);
}
inline void copies_commit() {
  ++simulator::world.current->group;
  simulator::complete_copies(0);
}
template <int pending>
inline void copies_wait() {
  simulator::complete_copies(simulator::world.current->group - pending);
}

// ---- threads meet ----

inline void block_sync() {
  simulator::Block& block = simulator::block();
  simulator::meet(block.meeting, block.warps.size() * 32, "block_sync", [] {});
}
inline void warp_sync() {
  simulator::meet(simulator::warp().meeting, 32, "warp_sync", [] {});
}
inline void cluster_sync() {
  simulator::Block& block = simulator::block();
  simulator::Cluster& cluster = *block.cluster;
  simulator::meet(cluster.meeting, cluster.blocks.size() * block.warps.size() * 32, "cluster_sync",
                  [] {});
}
inline uint32_t shuffle(uint32_t v, int from_lane) {
  struct Lane {
    uint32_t given, got;
    int from;
  } lane = {v, 0, from_lane};
  simulator::meet_in_warp("shuffle", lane, [](Lane** lanes) {
    for (int l = 0; l < 32; ++l) lanes[l]->got = lanes[lanes[l]->from & 31]->given;
  });
  return lane.got;
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  simulator::Block& block = simulator::block();
  simulator::shared_at(block, barrier, 8);
  for (const auto& other : block.barriers) {
    if (other.address == barrier) simulator::fail("a barrier initialised again");
  }
  block.barriers.emplace_back(barrier, static_cast<int>(arrivals));
}
inline void barrier_init_fence() {
  for (auto& barrier : simulator::block().barriers) barrier.published = true;
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  auto& b = simulator::barrier_at(simulator::block(), barrier);
  if (b.pending == 0) simulator::fail("more arrivals than a barrier expects");
  b.bytes += bytes;
  --b.pending;
  simulator::check_phase(b);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  for (;;) {
    auto& b = simulator::barrier_at(simulator::block(), barrier);
    if ((b.phase & 1) != parity) break;
    b.waiting.push_back(simulator::world.current);
    simulator::sleep("a barrier's phase");
  }
  simulator::world.current->fenced_for_wgmma = false;
}
inline void send(uint32_t to, Words4 v, uint32_t barrier) {
  const uint32_t rank = to >> 24;
  if (rank == 0 || rank != barrier >> 24) {
    simulator::fail("send() needs two addresses of one block of the cluster");
  }
  simulator::Block* block = simulator::block().cluster->blocks[rank - 1];
  simulator::shared_at(*block, to & 0xffffff, 16);
  simulator::world.messages.push_back(
      {block, to & 0xffffff, barrier & 0xffffff, {v.x, v.y, v.z, v.w}});
}
inline void fence_for_wgmma() { simulator::world.current->fenced_for_wgmma = true; }

// ---- matrices ----

inline void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  struct Lane {
    uint32_t address, r[4];
  } lane = {address, {}};
  simulator::meet_in_warp("load_matrices", lane, [](Lane** lanes) {
    for (int m = 0; m < 4; ++m) {
      for (int l = 0; l < 32; ++l) {
        const auto* row =
            simulator::shared_at(simulator::block(), lanes[m * 8 + l / 4]->address, 16);
        std::memcpy(&lanes[l]->r[m], row + l % 4 * 4, 4);
      }
    }
  });
  std::memcpy(r, lane.r, sizeof r);
}
template <int matrices>
void load_transposed(uint32_t address, uint32_t (&r)[matrices]) {
  struct Lane {
    uint32_t address, r[matrices];
  } lane = {address, {}};
  simulator::meet_in_warp("load_transposed", lane, [](Lane** lanes) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 2 * matrices; ++i) {
        const uint32_t from = lanes[i / 2 * 8 + 2 * (l % 4) + i % 2]->address;
        const auto* row = simulator::shared_at(simulator::block(), from, 16);
        std::memcpy(reinterpret_cast<char*>(lanes[l]->r) + 2 * i, row + l / 4 * 2, 2);
      }
    }
  });
  std::memcpy(r, lane.r, sizeof r);
}
inline void store_transposed(uint32_t address, const uint32_t (&r)[2]) {
  struct Lane {
    uint32_t address, r[2];
  } lane = {address, {r[0], r[1]}};
  simulator::meet_in_warp("store_transposed", lane, [](Lane** lanes) {
    for (int m = 0; m < 2; ++m) {
      for (int row = 0; row < 8; ++row) {
        uint16_t elements[8];
        for (int l = row / 2; l < 32; l += 4) {
          elements[l / 4] = static_cast<uint16_t>(lanes[l]->r[m] >> 16 * (row % 2));
        }
        simulator::write_shared(simulator::block(), lanes[m * 8 + row]->address, elements, 16);
      }
    }
  });
}

template <class T>
void hold(T&) {}

// ---- element types ----

inline uint32_t bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
inline float number(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

struct BFloat16 {
  static constexpr int kBytes = 2;
  static constexpr bool kApproximate = true;
  static uint16_t round(float f) {
    const uint32_t u = bits(f);
    if (std::isnan(f)) return 0x7fff;
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  static float value(uint16_t u) { return number(static_cast<uint32_t>(u) << 16); }
  static uint32_t pack(float a, float b) {
    return round(a) | static_cast<uint32_t>(round(b)) << 16;
  }
  static void unpack(uint32_t v, float& a, float& b) {
    a = value(static_cast<uint16_t>(v));
    b = value(static_cast<uint16_t>(v >> 16));
  }
};
struct Half {
  static constexpr int kBytes = 2;
  static constexpr bool kApproximate = false;
  static uint16_t round(float f) {
    const uint32_t sign = bits(f) >> 16 & 0x8000, u = bits(f) & 0x7fffffff;
    if (std::isnan(f)) return 0x7fff;
    if (u >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    // Below 2^-14: the sum's last bit is worth 2^-24, as a subnormal half's.
    if (u < 0x38800000) return static_cast<uint16_t>(sign | (bits(number(u) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  }
  static float value(uint16_t u) {
    const uint32_t sign = (u & 0x8000u) << 16, magnitude = u & 0x7fff;
    if (magnitude >= 0x7c00) return number(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return number(sign | bits(std::ldexp(float(magnitude), -24)));
    return number(sign | ((magnitude << 13) + 0x38000000));
  }
  static uint32_t pack(float a, float b) {
    return round(a) | static_cast<uint32_t>(round(b)) << 16;
  }
  static void unpack(uint32_t v, float& a, float& b) {
    a = value(static_cast<uint16_t>(v));
    b = value(static_cast<uint16_t>(v >> 16));
  }
};
struct Tf32 {
  static constexpr int kBytes = 4;
  static constexpr bool kApproximate = false;
  static uint32_t operand(uint32_t v) {
    return std::isnan(number(v)) ? 0x7fffffff : (v + 0x1000) & 0xffffe000;
  }
};
struct Tf32x3 {
  static constexpr int kBytes = 4;
  static constexpr bool kApproximate = false;
  static uint32_t operand(uint32_t v) { return v; }
};

// ---- tensor cores ----

namespace simulator {

// The 4-byte words of operands as numbers: two of 16 bits, or one that is cut off to TF32.
template <class Element>
struct Numbers {
  static constexpr int kInWord = 2;
  static float get(uint32_t word, int i) {
    return Element::value(static_cast<uint16_t>(word >> 16 * i));
  }
};
template <>
struct Numbers<Tf32> {
  static constexpr int kInWord = 1;
  static float get(uint32_t word, int) { return number(word & 0xffffe000); }
};

template <class Element>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using Number = Numbers<Element>;
  constexpr int kEach = Number::kInWord, kDepth = 8 * kEach;
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } lane = {d, a, {b0, b1}};
  meet_in_warp("multiply", lane, [](Lane** lanes) {
    float a[16][kDepth], b[8][kDepth];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, q = l % 4;
      for (int e = 0; e < kEach; ++e) {
        for (int i = 0; i < 4; ++i) {
          a[g + i % 2 * 8][(q + i / 2 * 4) * kEach + e] = Number::get(lanes[l]->a[i], e);
        }
        for (int i = 0; i < 2; ++i) b[g][(q + i * 4) * kEach + e] = Number::get(lanes[l]->b[i], e);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const float* row = a[l / 4 + i / 2 * 8];
        const float* column = b[l % 4 * 2 + i % 2];
        float sum = lanes[l]->d[i];
        for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
        lanes[l]->d[i] = sum;
      }
    }
  });
}

template <class Element>
void finish(const Product& product, Block& block) {
  const auto field = [&](int from) {
    return static_cast<uint32_t>(product.b >> from & 0x3fff) << 4;
  };
  const uint32_t start = field(0), atom = field(32);
  float a[16][16], b[64][16];
  for (int n = 0; n < product.columns; ++n) {
    for (int k = 0; k < 16; ++k) {
      uint32_t address = start + n / 8 * atom + n % 8 * 128 + k * 2;
      address ^= (address >> 7 & 7) << 4;
      uint16_t element;
      std::memcpy(&element, shared_at(block, address, 2), 2);
      b[n][k] = Element::value(element);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) {
        a[l / 4 + i % 2 * 8][(l % 4 + i / 2 * 4) * 2 + e] =
            Numbers<Element>::get(product.a[l][i], e);
      }
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < product.columns / 2; ++i) {
      const float* row = a[l / 4 + i / 2 % 2 * 8];
      const float* column = b[i / 4 * 8 + l % 4 * 2 + i % 2];
      float sum = product.add ? product.d[l][i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      product.d[l][i] = sum;
    }
  }
}

}  // namespace simulator

inline void multiply(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simulator::multiply<BFloat16>(d, a, b0, b1);
}
inline void multiply(Half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simulator::multiply<Half>(d, a, b0, b1);
}
inline void multiply(Tf32, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simulator::multiply<Tf32>(d, a, b0, b1);
}

// ---- wgmma ----
// A warp's 16 rows of a product are done when it waits for them, and no earlier.

inline void wgmma_fence() {
  simulator::meet(simulator::warp().meeting, 32, "wgmma_fence",
                  [] { simulator::warp().fenced = true; });
}
inline void wgmma_commit() {
  simulator::meet(simulator::warp().meeting, 32, "wgmma_commit", [] {
    for (auto& product : simulator::warp().products) product.committed = true;
  });
}
inline void wgmma_wait() {
  simulator::meet(simulator::warp().meeting, 32, "wgmma_wait", [] {
    simulator::Warp& warp = simulator::warp();
    for (const auto& product : warp.products) {
      if (!product.committed) simulator::fail("wgmma_wait before wgmma_commit");
      if (product.bfloat16) {
        simulator::finish<BFloat16>(product, simulator::block());
      } else {
        simulator::finish<Half>(product, simulator::block());
      }
    }
    warp.products.clear();
    warp.fenced = false;
  });
}
inline uint32_t uniform(uint32_t v) { return shuffle(v, 0); }

template <class Element, int size>
inline void wgmma(Element, float (&d)[size], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(size <= 32, "up to 64 columns");
  struct Lane {
    float* d;
    const uint32_t* a;
    uint64_t b;
    bool add, fenced;
  } lane = {d, a, b, add, simulator::world.current->fenced_for_wgmma};
  simulator::meet_in_warp("wgmma", lane, [](Lane** lanes) {
    simulator::Warp& warp = simulator::warp();
    if (!warp.fenced) simulator::fail("wgmma without wgmma_fence");
    simulator::Product product = {
        2 * size, std::is_same<Element, BFloat16>::value, lanes[0]->add, false, lanes[0]->b, {},
        {}};
    for (int l = 0; l < 32; ++l) {
      if (lanes[l]->b != product.b || lanes[l]->add != product.add) {
        simulator::fail("wgmma's operand differs within a warp");
      }
      if (!lanes[l]->fenced) simulator::fail("wgmma without fence_for_wgmma");
      std::memcpy(product.a[l], lanes[l]->a, sizeof product.a[l]);
      product.d[l] = lanes[l]->d;
    }
    auto& operands = simulator::block().wgmma_operands[thread() / 128];
    if (warp.issued == operands.size()) operands.push_back(product.b);
    if (operands[warp.issued++] != product.b) {
      simulator::fail("wgmma's operand differs within a warpgroup");
    }
    warp.products.push_back(product);
  });
}

// ---- elementary functions ----

inline float approximate_tanh(float x) { return std::tanh(x); }
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float divide(float a, float b) { return a / b; }
inline float absolute(float x) { return std::fabs(x); }

}  // namespace rnnkern::cuda
