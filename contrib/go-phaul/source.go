package relay

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/phaul"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

const (
	// phaul's own limits; it counts pages.
	defaultPreDumps = 8
	fewBytes        = 64 << 12

	logLevel = 4
	// How long the proxy has to tell why a round failed.
	reasonWithin = time.Second
)

// Options say what a [Source] migrates to where, and how.
type Options struct {
	// Snapshot is the id under which the cache gets it. It is to be a new one for every attempt.
	Snapshot string
	// To is the cache, HOST or HOST:PORT; empty for the one that the proxy is configured with.
	To string
	// Proxy is the proxy's control socket, by default [Proxy].
	Proxy Daemon

	// PreDumps is how many rounds there are at most before the last one, by default 8. There are fewer when a round
	// brings less than 256 KiB, or no less than the one before. phaul's client (go-criu 7 and 8) stops after the first
	// one, which it takes for growth; the others are made when it asks for the last.
	PreDumps int
	// Criu, if it is set, changes what CRIU is asked to do in the last round and in those after phaul's: to dump
	// established TCP connections or a shell's job, for instance.
	Criu func(*rpc.CriuOpts)
	// Round, if it is set, is told of each round that the cache holds. The last one is told of when the process is gone.
	Round func(Round)

	// HandOver, if it is set, is called when the cache holds the whole snapshot, with the process frozen. An error lets
	// the process run on; without one CRIU kills it. To restore at the destination here means that a restore that fails
	// loses nothing, and that two copies run if this fails after the restore has not.
	HandOver func(context.Context) error
}

// A Round is a pre-dump, or the dump that is the last.
type Round struct {
	// Number counts from 1.
	Number int
	// Bytes of pages were sent.
	Bytes uint64
	// Took is how long it lasted. The process stood still for a part of it; the last time for all of it, and then it
	// includes the hand-over.
	Took time.Duration
	Last bool
}

// An UnclearError says that the cache acknowledged the whole snapshot, and the hand-over was done, but CRIU failed then.
// Whether the process is gone has to be looked at before anything is restored.
type UnclearError struct{ cause error }

func (e *UnclearError) Error() string {
	return fmt.Sprintf("the cache has the snapshot, but whether the process is gone is not known: %v", e.cause)
}

func (e *UnclearError) Unwrap() error { return e.cause }

// A Source is a migration on the source host. It is phaul's Remote, which has nothing to start and stop because the proxy
// takes round after round, and its Local, which makes the last dump. It serves one migration of one process tree.
type Source struct {
	options Options
	// phaul's interfaces have none.
	ctx     context.Context
	unwatch func() bool

	mutex sync.Mutex
	pages int // the end that CRIU gets; -1 when it is closed

	rounds int
	sent   uint64 // in all rounds, bytes
	fresh  uint64 // in the one before
	begun  time.Time
	last   bool
	over   bool // the process is gone
}

var (
	_ phaul.Remote = (*Source)(nil)
	_ phaul.Local  = (*Source)(nil)
)

// NewSource opens the way for the pages of a snapshot at the proxy. When ctx ends, the migration under way fails and the
// process runs on, unless it was handed over before.
func NewSource(ctx context.Context, options Options) (*Source, error) {
	if options.Snapshot == "" {
		return nil, errors.New("the snapshot has no id")
	}
	if options.Proxy == "" {
		options.Proxy = Proxy
	}
	if options.PreDumps == 0 {
		options.PreDumps = defaultPreDumps
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	defer theirs.Close()
	if err := options.Proxy.OpenPages(ctx, options.Snapshot, options.To, theirs); err != nil {
		return nil, err
	}
	// CRIU inherits it, under the same number. It is not a file of Go's, which would not block.
	pages, err := syscall.Dup(int(ours.Fd()))
	if err != nil {
		return nil, fmt.Errorf("the socket for pages: %w", err)
	}
	s := &Source{options: options, ctx: ctx, pages: pages}
	s.unwatch = context.AfterFunc(ctx, s.hangUp)
	return s, nil
}

// Config is what phaul's client needs for a process. The directory workDir has to be there; it gets a directory with the
// small images and the log of each round, called 0, 1 and so on, which must not be there.
//
// Until [Source.Close] every program that is started inherits Config.Memfd, because CRIU has to.
func (s *Source) Config(pid int32, workDir string) phaul.Config {
	return phaul.Config{Pid: pid, Memfd: s.pages, Wdir: workDir}
}

// Migrate has phaul's client migrate a process: pre-dumps, then the dump. Without an error the process is gone, and the
// cache at the destination holds all of it. With one it runs on, unless the error is an [*UnclearError].
func (s *Source) Migrate(pid int32, workDir string) error {
	client, err := phaul.MakePhaulClient(s, s, s.Config(pid, workDir))
	if err != nil {
		return err
	}
	err = client.Migrate()
	if s.over {
		// What phaul tidies up afterwards changes nothing of that.
		return nil
	}
	return s.because(err)
}

// Close ends the way for the pages.
func (s *Source) Close() error {
	s.unwatch()
	s.hangUp()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.pages < 0 {
		return nil
	}
	pages := s.pages
	s.pages = -1
	return syscall.Close(pages)
}

// hangUp ends the conversation of CRIU and the proxy, so that both fail.
func (s *Source) hangUp() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.pages >= 0 {
		_ = syscall.Shutdown(s.pages, syscall.SHUT_RDWR)
	}
}

// StartIter implements phaul's Remote. It fails when the proxy waits for no round of this snapshot.
func (s *Source) StartIter() error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	s.begun = time.Now()
	_, err := s.snapshot(s.ctx)
	return err
}

// StopIter implements phaul's Remote. It fails when the cache does not hold the pages of the round.
func (s *Source) StopIter() error {
	if s.last {
		// DumpCopyRestore has said what there is to say.
		return nil
	}
	if err := s.held(); err != nil {
		return err
	}
	s.tell()
	return nil
}

// DumpCopyRestore implements phaul's Local: more pre-dumps if they are worth it, then the dump, which is handed over before
// CRIU kills the process.
func (s *Source) DumpCopyRestore(cr *criu.Criu, config phaul.Config, lastImages string) error {
	lastImages, err := s.preDumpOn(cr, config, lastImages)
	if err != nil {
		return err
	}
	s.last = true
	if err := s.StartIter(); err != nil {
		return err
	}
	dir, options, err := s.nextRound(config, lastImages, "dump.log")
	if err != nil {
		return err
	}
	defer dir.Close()
	notified := &handOver{source: s, dir: dir.Name()}
	if err := cr.Dump(options, notified); err != nil {
		// The process is frozen until CRIU hears that this is all. How CRIU exits then is no news.
		_ = cr.Cleanup()
		if notified.done {
			err = &UnclearError{err}
		}
		return s.because(err)
	}
	s.over = true
	s.tell()
	return nil
}

// preDumpOn goes on with the rounds where phaul stops too early. It returns the directory of the last one.
func (s *Source) preDumpOn(cr *criu.Criu, config phaul.Config, lastImages string) (string, error) {
	before := uint64(math.MaxUint64)
	for s.rounds < s.options.PreDumps && s.fresh >= fewBytes && s.fresh < before {
		if err := s.StartIter(); err != nil {
			return "", err
		}
		dir, options, err := s.nextRound(config, lastImages, "pre-dump.log")
		if err != nil {
			return "", err
		}
		err = cr.PreDump(options, nil)
		dir.Close()
		if err != nil {
			return "", s.because(err)
		}
		lastImages, before = dir.Name(), s.fresh
		if err := s.StopIter(); err != nil {
			return "", err
		}
	}
	return lastImages, nil
}

// nextRound makes the directory after that of the round before, and says what CRIU is to do there.
func (s *Source) nextRound(config phaul.Config, lastImages, log string) (*os.File, *rpc.CriuOpts, error) {
	number, err := strconv.Atoi(filepath.Base(lastImages))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: not a directory of phaul's rounds: %w", lastImages, err)
	}
	path := filepath.Join(filepath.Dir(lastImages), strconv.Itoa(number+1))
	if err := os.Mkdir(path, 0o700); err != nil {
		return nil, nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	options := &rpc.CriuOpts{
		Pid:         proto.Int32(config.Pid),
		LogLevel:    proto.Int32(logLevel),
		LogFile:     proto.String(log),
		ImagesDirFd: proto.Int32(int32(dir.Fd())),
		ParentImg:   proto.String(lastImages),
		TrackMem:    proto.Bool(true),
		Ps:          &rpc.CriuPageServerInfo{Fd: proto.Int32(int32(config.Memfd))},
	}
	if s.options.Criu != nil {
		s.options.Criu(options)
	}
	return dir, options, nil
}

// snapshot asks the proxy.
func (s *Source) snapshot(ctx context.Context) (Snapshot, error) {
	snapshot, err := s.options.Proxy.Show(ctx, s.options.Snapshot)
	if err == nil && snapshot.State == Damaged {
		err = &DamagedError{snapshot.ID, snapshot.Reason}
	}
	return snapshot, err
}

// held counts the round that has ended, once the cache holds its pages. CRIU's own statistics would add up all rounds of
// one conversation, or not, as its version has it.
func (s *Source) held() error {
	snapshot, err := s.snapshot(s.ctx)
	if err != nil {
		return err
	}
	if snapshot.State != Paged {
		return fmt.Errorf("round %d of snapshot %s has ended, and it is %s", s.rounds+1, snapshot.ID, snapshot.State)
	}
	s.rounds++
	s.fresh = snapshot.Bytes - s.sent
	s.sent = snapshot.Bytes
	return nil
}

// tell reports the round that was counted.
func (s *Source) tell() {
	if s.options.Round != nil {
		s.options.Round(Round{Number: s.rounds, Bytes: s.fresh, Took: time.Since(s.begun), Last: s.last})
	}
}

// because adds what the proxy knows of a failure: CRIU knows only that its page server has failed.
func (s *Source) because(err error) error {
	var damaged *DamagedError
	if err == nil || errors.As(err, &damaged) {
		return err
	}
	if cause := context.Cause(s.ctx); cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w (%w)", err, cause)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), reasonWithin)
	defer cancel()
	if _, told := s.snapshot(ctx); errors.As(told, &damaged) {
		return fmt.Errorf("%w (%w)", err, damaged)
	}
	return err
}

// handOver is what CRIU notifies in the last round.
type handOver struct {
	criu.NoNotify
	source *Source
	dir    string
	done   bool
}

// PostDump runs when every image is written and the process is frozen.
func (h *handOver) PostDump() error {
	options := &h.source.options
	ctx := h.source.ctx
	if err := h.source.held(); err != nil {
		return err
	}
	if err := options.Proxy.Push(ctx, options.Snapshot, options.To, h.dir); err != nil {
		return err
	}
	if options.HandOver != nil {
		if err := options.HandOver(ctx); err != nil {
			return fmt.Errorf("the hand-over: %w (the cache keeps the snapshot until it is dropped there)", err)
		}
	}
	h.done = true
	return nil
}
