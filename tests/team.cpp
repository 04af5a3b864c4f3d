// csrc/cpu/team.h under threads that are late, or stand still anywhere: every step must read the
// states of the one before, whoever made them, and be done once, for its output lies where its
// input was. Prints how often a member went on alone, how often one came too late, and how many
// states were read early.
#include <chrono>
#include <random>
#include <thread>

namespace {
thread_local std::mt19937 generator;

void stumble(int one_in) {
  if (generator() % one_in == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(generator() % 400));
  }
}
}  // namespace

#define RNNKERN_TEAM_POINT() stumble(1000)
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cpu/team.h"

using rnnkern::cpu::Team;
using rnnkern::cpu::TeamMember;

namespace {

constexpr int kSteps = 200, kPanels = 7;
using States = std::vector<std::vector<unsigned>>;

// A panel's next state depends on its input and on every panel's state.
unsigned next_of(const std::vector<unsigned>& state, unsigned input) {
  for (const unsigned s : state) input = input * 31 + s;
  return input;
}

States inputs() {
  States rows(kSteps, std::vector<unsigned>(kPanels));
  for (int t = 0; t < kSteps; ++t) {
    for (int p = 0; p < kPanels; ++p) rows[t][p] = t * 2654435761u + p;
  }
  return rows;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 50;
  States right = inputs();
  std::vector<unsigned> state(kPanels, 1);
  for (auto& row : right) {
    for (auto& value : row) value = next_of(state, value);
    state = row;
  }
  std::atomic<int> alone{0}, excluded{0}, early{0};
  for (int round = 0; round < rounds; ++round) {
    const int members = 1 + round % 5, threads = 1 + round % members;
    Team team(members, kPanels, /*step_flops=*/1);
    States rows = inputs();
    std::vector<unsigned> states[2] = {std::vector<unsigned>(kPanels, 1),
                                       std::vector<unsigned>(kPanels, 0)};
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i) {
      all.emplace_back([&, i] {
        generator.seed(round * 100 + i);
        stumble(2);
        TeamMember member(team, members * i / threads, members * (i + 1) / threads);
        if (!member.arrived()) {
          ++excluded;
          return;
        }
        bool was_alone = false;
        for (int t = 0; t < kSteps; ++t) {
          // What a member may read before it begins: its own states of the step before.
          const auto own = member.own_half();
          for (auto p = own.first; p < own.last; ++p) {
            if (states[t % 2][p] != (t > 0 ? right[t - 1][p] : 1)) std::exit(2);
            ++early;
          }
          const auto mine = member.begin(t);
          if (mine.first == mine.last) return;
          was_alone = was_alone || (threads > 1 && mine.last - mine.first == kPanels);
          for (auto p = mine.first; p < mine.last; ++p) {
            rows[t][p] = next_of(states[t % 2], rows[t][p]);
            states[(t + 1) % 2][p] = rows[t][p];
            stumble(3000);
          }
          member.end(t);
        }
        alone += was_alone;
      });
    }
    for (auto& thread : all) thread.join();
    if (rows != right) {
      std::printf("round %d: wrong states\n", round);
      return 1;
    }
  }
  std::printf("alone %d excluded %d early %d\n", alone.load(), excluded.load(), early.load());
}
