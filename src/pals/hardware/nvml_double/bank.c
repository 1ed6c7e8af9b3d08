/* Opens, copies and writes the mapped bank file. Physics is Python's alone: whoever keeps the bank (pals serve, pals
   emulate nvml, a simulator) integrates and publishes; here registers are written and published readings are copied.

   Staleness: readings that nobody refreshed for PALS_STALE_S are not shown. nvmlInit then answers DRIVER_NOT_LOADED, a
   board already open GPU_IS_LOST. In virtual time they count as fresh while the process that drives the time lives. */
#define _GNU_SOURCE
#include "bank.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const double PATIENCE_S = 2.0;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int users;
static struct {
    int fd, writable;
    pid_t owner;
    size_t size;
    ino_t inode;
    pals_head *head;
    pals_board *boards;
    pals_reading *readings;
    pals_process *processes;
} bank;

static double monotonic_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void sleep_s(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - floor(seconds)) * 1e9)};
    while (nanosleep(&t, &t) == -1 && errno == EINTR) {
    }
}

int pals_process_lives(int64_t pid) {
    char path[64], state = 'Z';
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    FILE *file = pid > 0 ? fopen(path, "r") : NULL;
    if (!file) return 0;
    char text[512] = "";
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    const char *after_name = strrchr(text, ')');
    if (after_name && after_name[1] == ' ') state = after_name[2];
    return state != 'Z' && state != 'X';
}

static int is_fresh(const pals_head *head) {
    if (!isnan(head->virtual_s)) return pals_process_lives(head->keeper_pid);
    double age_s = monotonic_s() - head->refreshed_s;
    return age_s < PALS_STALE_S && age_s > -PALS_STALE_S; /* NaN, and a clock of before a reboot, are not fresh */
}

static void complain(const char *path, const char *why) {
    static int once;
    if (!once++) fprintf(stderr, "pals: emulated NVML: %s: %s\n", path ? path : "PALS_EMU_BOARDS", why);
}

static void close_bank(void) {
    if (bank.head) {
        munmap(bank.head, bank.size);
        close(bank.fd);
    }
    memset(&bank, 0, sizeof bank);
}

static nvmlReturn_t map_bank(int fd, const char *path) {
    struct stat info;
    if (fstat(fd, &info) || (size_t)info.st_size < sizeof(pals_head)) return NVML_ERROR_DRIVER_NOT_LOADED;
    int writable = (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
    void *at = mmap(NULL, (size_t)info.st_size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return NVML_ERROR_DRIVER_NOT_LOADED;
    pals_head *head = at;
    size_t needed = sizeof *head + PALS_PROCESSES * sizeof(pals_process);
    needed += (size_t)head->count * (sizeof(pals_board) + sizeof(pals_reading));
    if (memcmp(head->magic, "PALSBANK", 8) || head->layout != PALS_LAYOUT || needed > (size_t)info.st_size) {
        munmap(at, (size_t)info.st_size);
        complain(path, "not a bank of this PALS version; run `pals emulate nvml` of the version that serves");
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    }
    close_bank();
    bank.fd = fd, bank.writable = writable, bank.owner = getpid();
    bank.size = (size_t)info.st_size, bank.inode = info.st_ino, bank.head = head;
    bank.boards = (pals_board *)(head + 1);
    bank.readings = (pals_reading *)(bank.boards + head->count);
    bank.processes = (pals_process *)(bank.readings + head->count);
    return NVML_SUCCESS;
}

static nvmlReturn_t open_bank(void) {
    const char *path = getenv("PALS_EMU_BOARDS");
    if (!path || !*path) {
        complain(NULL, "not set; `pals emulate nvml` prints what to export");
        return NVML_ERROR_DRIVER_NOT_LOADED;
    }
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) fd = open(path, O_RDONLY | O_CLOEXEC); /* another user's boards: to look at, not to set */
    if (fd < 0) {
        complain(path, "cannot be opened; is `pals serve --emulate` (or `pals emulate nvml --boards`) running?");
        return NVML_ERROR_DRIVER_NOT_LOADED;
    }
    nvmlReturn_t code = map_bank(fd, path);
    if (code != NVML_SUCCESS) close(fd);
    return code;
}

/* A file lock belongs to an open file, and a fork shares it: the child opens the file anew. */
static void follow_fork(void) {
    if (bank.owner == getpid()) return;
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", bank.fd);
    int fd = open(path, (bank.writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0) return;
    close(bank.fd);
    bank.fd = fd, bank.owner = getpid();
}

/* Where the boards went stale because another server took the path over, its boards are the ones to show. */
static void follow_server(void) {
    struct stat info;
    const char *path = getenv("PALS_EMU_BOARDS");
    if (path && !stat(path, &info) && info.st_ino != bank.inode) open_bank();
}

/* On success the mutex is held: the mapping stays while it is used. */
static nvmlReturn_t enter(void) {
    pthread_mutex_lock(&mutex);
    if (!users) {
        pthread_mutex_unlock(&mutex);
        return NVML_ERROR_UNINITIALIZED;
    }
    if (!is_fresh(bank.head)) follow_server();
    return NVML_SUCCESS;
}

/* Readers take no lock, so that no tool, however eager, delays the engine: they copy again while the sequence number is
   odd or has moved. Where a writer was killed in between, the readings go stale and the copy is not shown. */
static nvmlReturn_t copy_consistently(void (*copy)(pals_view *), pals_view *view) {
    double until_s = monotonic_s() + PATIENCE_S;
    for (;;) {
        uint64_t before = __atomic_load_n(&bank.head->sequence, __ATOMIC_ACQUIRE);
        copy(view);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        uint64_t after = __atomic_load_n(&bank.head->sequence, __ATOMIC_RELAXED);
        if ((before == after && before % 2 == 0) || !is_fresh(bank.head)) return NVML_SUCCESS;
        if (monotonic_s() > until_s) return NVML_ERROR_TIMEOUT; /* the writer is stopped */
        sleep_s(0.00002);
    }
}

static nvmlReturn_t lock_to_write(void) {
    follow_fork();
    double until_s = monotonic_s() + PATIENCE_S;
    while (flock(bank.fd, LOCK_EX | LOCK_NB)) {
        if (monotonic_s() > until_s) return NVML_ERROR_TIMEOUT;
        sleep_s(0.0002);
    }
    return NVML_SUCCESS;
}

nvmlReturn_t pals_begin(void) {
    pthread_mutex_lock(&mutex);
    nvmlReturn_t code = users ? NVML_SUCCESS : open_bank();
    if (code == NVML_SUCCESS && !users && !is_fresh(bank.head)) {
        close_bank();
        complain(getenv("PALS_EMU_BOARDS"), "nobody keeps these boards any more; the server that emulated them has ended");
        code = NVML_ERROR_DRIVER_NOT_LOADED;
    }
    if (code == NVML_SUCCESS) users++;
    pthread_mutex_unlock(&mutex);
    return code;
}

nvmlReturn_t pals_end(void) {
    pthread_mutex_lock(&mutex);
    nvmlReturn_t code = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users && !--users) close_bank();
    pthread_mutex_unlock(&mutex);
    return code;
}

static void copy_head(pals_view *view) { view->head = *bank.head; }

static void copy_board(pals_view *view) {
    size_t n = 0;
    copy_head(view);
    view->board = bank.boards[view->index];
    view->reading = bank.readings[view->index];
    memset(view->processes, 0, sizeof view->processes);
    for (size_t k = 0; k < PALS_PROCESSES; k++) {
        const pals_process *p = &bank.processes[k];
        if (p->pid && (p->boards >> view->index) & 1) view->processes[n++] = *p;
    }
}

nvmlReturn_t pals_head_of(pals_head *head) {
    pals_view view;
    nvmlReturn_t code = enter();
    if (code != NVML_SUCCESS) return code;
    code = copy_consistently(copy_head, &view);
    pthread_mutex_unlock(&mutex);
    *head = view.head;
    return code;
}

nvmlReturn_t pals_identify(nvmlDevice_t device, pals_view *view) {
    nvmlReturn_t code = enter();
    if (code != NVML_SUCCESS) return code;
    uintptr_t number = (uintptr_t)device;
    view->index = (unsigned int)number - 1;
    if (number < 1 || number > (uintptr_t)bank.head->count) code = NVML_ERROR_INVALID_ARGUMENT;
    if (code == NVML_SUCCESS) code = copy_consistently(copy_board, view);
    pthread_mutex_unlock(&mutex);
    return code;
}

nvmlReturn_t pals_look(nvmlDevice_t device, pals_view *view) {
    nvmlReturn_t code = pals_identify(device, view);
    if (code == NVML_SUCCESS && (view->board.lost || !is_fresh(&view->head))) code = NVML_ERROR_GPU_IS_LOST;
    return code;
}

static double uniform(uint64_t x) { /* above 0, at most 1 (SplitMix64) */
    x += 0x9E3779B97F4A7C15ULL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
    return (double)(((x ^ (x >> 31)) >> 11) + 1) * 0x1p-53;
}

/* As plant/setter_time.py: a log-normal tail above the shortest time. */
static double setter_time_s(const pals_view *v) {
    const pals_head *h = &v->head;
    if (h->setter_latency_s <= 0) return v->board.setter_extra_s;
    uint64_t key = h->seed * 0x9E3779B97F4A7C15ULL + v->index * 0xD1B54A32D192ED03ULL + (uint64_t)v->board.writes * 2;
    double z = fabs(sqrt(-2 * log(uniform(key))) * cos(2 * 3.14159265358979323846 * uniform(key + 1)));
    double longest_s = fmax(h->setter_longest_s, h->setter_latency_s);
    return v->board.setter_extra_s + fmin(longest_s, h->setter_latency_s * exp(h->setter_tail_sigma * z));
}

nvmlReturn_t pals_set(nvmlDevice_t device, int valid, nvmlReturn_t refusal, void (*change)(pals_board *, double, double), double a, double b) {
    pals_view view;
    nvmlReturn_t code = pals_look(device, &view);
    if (code != NVML_SUCCESS) return code;
    if (view.board.not_supported) return NVML_ERROR_NOT_SUPPORTED;
    if (view.board.denied || !view.head.writable || !bank.writable) return NVML_ERROR_NO_PERMISSION;
    if (refusal != NVML_SUCCESS) return refusal; /* a fault injected for this setter alone */
    if (!valid) return NVML_ERROR_INVALID_ARGUMENT;
    if (isnan(view.head.virtual_s)) sleep_s(setter_time_s(&view)); /* in virtual time only the simulator waits */
    code = enter();
    if (code != NVML_SUCCESS) return code;
    if (view.index >= bank.head->count) code = NVML_ERROR_GPU_IS_LOST; /* another server's boards by now, and fewer */
    if (code == NVML_SUCCESS) code = lock_to_write();
    if (code == NVML_SUCCESS) {
        uint64_t writing = bank.head->sequence | 1; /* odd already: its writer was killed */
        __atomic_store_n(&bank.head->sequence, writing, __ATOMIC_SEQ_CST);
        change(&bank.boards[view.index], a, b);
        bank.boards[view.index].writes++;
        __atomic_store_n(&bank.head->sequence, writing + 1, __ATOMIC_SEQ_CST);
        flock(bank.fd, LOCK_UN);
    }
    pthread_mutex_unlock(&mutex);
    return code;
}
