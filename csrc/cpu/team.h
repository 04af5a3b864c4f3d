// Threads that share the columns of one group's steps.
//
// Each owns a range of panels, and begins a step when all have ended the one before: then every
// state that it reads is there, and nobody still reads the buffer that it writes. Where a thread
// waits far longer than a step takes, another program has a peer's core, and would have it again
// and again: the waiting one takes the step over, and all after it, at the speed of one thread
// rather than that of the scheduler.
//
// It can only while nobody has begun the step, and nobody begins it afterwards. Members write down
// what they begin, each where nobody looks; one that would take over makes its wish known, then
// looks there. Who has seen no wish is seen to have begun; those who see it settle with one another
// which came first. The others leave when they come to that step, with all before it ended; the one
// that goes on waits until they have. So every panel of every step is done once, which a scan whose
// output lies where its input was depends on.
#pragma once
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "scan_params.h"

// Between two accesses to what threads share: where a test lets a thread stand still.
#ifndef RNNKERN_TEAM_POINT
#define RNNKERN_TEAM_POINT()
#endif

namespace rnnkern::cpu {

class Team {
 public:
  Team(int64_t members, int64_t panels, double step_flops)
      : members_(members),
        panels_(panels),
        // A step at a thirtieth of a core's speed, and the time it takes to wake a thread.
        patience_(
            std::chrono::nanoseconds(100'000 + static_cast<int64_t>(step_flops / members / 3))),
        progress_(std::make_unique<Progress[]>(members)) {}

 private:
  friend class TeamMember;
  static constexpr int64_t kExpected = -1, kExcluded = -2;
  // In lines of their own: a line that another thread has read takes as long to write as to fetch.
  struct Progress {
    alignas(64) std::atomic<int64_t> ended{kExpected};  // steps
    std::atomic<bool> left{false};
    alignas(64) std::atomic<int64_t> begun{-1};  // the last step
  };
  struct alignas(64) Settled {
    std::atomic<int64_t> wished{-1};  // the last step that a member would take over
    // Of the steps that were wished for, the last that was begun, or taken(s): one goes on alone
    // from step s.
    std::atomic<int64_t> turn{-1};
  };
  static int64_t taken(int64_t step) { return -2 - step; }

  bool all_ended(int64_t steps) const {
    for (int64_t i = 0; i < members_; ++i) {
      if (progress_[i].ended.load(std::memory_order_acquire) < steps) return false;
    }
    return true;
  }

  int64_t members_, panels_;
  std::chrono::nanoseconds patience_;
  std::unique_ptr<Progress[]> progress_;
  std::unique_ptr<Settled> settled_ = std::make_unique<Settled>();
};

// What one thread does for members [first, last) of a team.
class TeamMember final : public Member {
 public:
  TeamMember(Team& team, int64_t first, int64_t last) : team_(team), first_(first), last_(last) {
    for (int64_t i = first; i < last; ++i) {
      int64_t expected = Team::kExpected;
      arrived_ = team.progress_[i].ended.compare_exchange_strong(expected, 0) && arrived_;
    }
  }
  TeamMember(const TeamMember&) = delete;
  ~TeamMember() {
    for (int64_t i = first_; i < last_; ++i) {
      team_.progress_[i].left.store(true, std::memory_order_release);
    }
  }

  // False: the others have gone on without this thread.
  bool arrived() const { return arrived_; }

  Columns begin(int64_t step) override {
    if (alone_) return {0, team_.panels_};
    std::chrono::steady_clock::time_point since{};
    for (int spins = 1; !team_.all_ended(step); ++spins) {
      RNNKERN_TEAM_POINT();
      if (team_.settled_->turn.load() == Team::taken(step)) return {0, 0};
      pause();
      if (spins % 64 != 0) continue;
      const auto now = std::chrono::steady_clock::now();
      if (since == std::chrono::steady_clock::time_point{}) since = now;
      if (now - since < team_.patience_ || !take(step)) continue;
      RNNKERN_TEAM_POINT();
      wait_until_others_left();
      alone_ = true;
      return {0, team_.panels_};
    }
    RNNKERN_TEAM_POINT();
    team_.progress_[first_].begun.store(step);
    RNNKERN_TEAM_POINT();
    if (team_.settled_->wished.load() < step) return share();
    settle(step, step);
    return team_.settled_->turn.load() == Team::taken(step) ? Columns{0, 0} : share();
  }

  void end(int64_t step) override {
    for (int64_t i = first_; i < last_; ++i) {
      team_.progress_[i].ended.store(step + 1, std::memory_order_release);
    }
  }

  Columns own_half() const override {
    const bool half = team_.members_ == 2 && last_ - first_ == 1 && !alone_;
    return half ? share() : Columns{0, 0};
  }

 private:
  Columns share() const {
    return {team_.panels_ * first_ / team_.members_, team_.panels_ * last_ / team_.members_};
  }

  // Whether this member's word, `step` or taken(step), is the first on that step.
  bool settle(int64_t step, int64_t word) {
    int64_t before = team_.settled_->turn.load();
    while (-1 <= before && before < step) {
      if (team_.settled_->turn.compare_exchange_weak(before, word)) return true;
    }
    return false;
  }

  // Whether all steps from this one on are this member's. In the one order of all these accesses,
  // begin()'s too, who is not seen to have begun comes to see the wish.
  bool take(int64_t step) {
    std::atomic<int64_t>& wished = team_.settled_->wished;
    int64_t before = wished.load();
    while (before < step && !wished.compare_exchange_weak(before, step)) {
    }
    for (int64_t i = 0; i < team_.members_; ++i) {
      RNNKERN_TEAM_POINT();
      if (team_.progress_[i].begun.load() >= step) return false;
    }
    RNNKERN_TEAM_POINT();
    return settle(step, Team::taken(step));
  }

  void wait_until_others_left() const {
    for (int64_t i = 0; i < team_.members_; ++i) {
      if (first_ <= i && i < last_) continue;
      Team::Progress& other = team_.progress_[i];
      int64_t expected = Team::kExpected;
      if (other.ended.compare_exchange_strong(expected, Team::kExcluded)) continue;
      while (!other.left.load(std::memory_order_acquire)) std::this_thread::yield();
    }
  }

  static void pause() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  Team& team_;
  int64_t first_, last_;
  bool arrived_ = true, alone_ = false;
};

}  // namespace rnnkern::cpu
