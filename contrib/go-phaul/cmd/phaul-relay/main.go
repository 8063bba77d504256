// Phaul-relay live-migrates a process tree with go-criu's phaul through criu-image-proxy and criu-image-cache.
//
//	source host#       phaul-relay migrate -id web -pid 4711
//	destination host#  phaul-relay restore -id web
//
// The restore is to be started once the migration has succeeded, or by it: with -hand-over 'ssh host phaul-relay restore -id
// web' the process runs on at the source if the restore fails.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	relay "criu-image-relay/go-phaul"
)

const usage = `usage: phaul-relay migrate -id ID -pid PID [-to HOST[:PORT]] [-proxy SOCKET] [-work-dir DIR] [-hand-over COMMAND]
       phaul-relay restore -id ID [-cache SOCKET] [-work-dir DIR]
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	commands := map[string]func(context.Context, []string) error{"migrate": migrate, "restore": restore}
	command := func(context.Context, []string) error { return flag.ErrHelp }
	if len(os.Args) > 1 && commands[os.Args[1]] != nil {
		command = commands[os.Args[1]]
	}
	switch err := command(ctx, os.Args[min(2, len(os.Args)):]); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	case err != nil:
		fmt.Fprintf(os.Stderr, "phaul-relay: %v\n", err)
		os.Exit(1)
	}
}

func migrate(ctx context.Context, args []string) (failed error) {
	flags := flag.NewFlagSet("migrate", flag.ExitOnError)
	id := flags.String("id", "", "the snapshot's `id`: a new one for every attempt")
	pid := flags.Int("pid", 0, "the process, with all its children")
	to := flags.String("to", "", "the cache, `HOST[:PORT]` (default: the proxy's)")
	proxy := flags.String("proxy", string(relay.Proxy), "the proxy's control `socket`")
	workDir := flags.String("work-dir", "", "a `directory` for small images and logs, kept (default: a temporary one, kept on failure)")
	handOver := flags.String("hand-over", "", "a `command` of the shell to run when the cache has everything: if it fails, the process runs on")
	preDumps := flags.Int("pre-dumps", 0, "how many rounds at most while the process runs (default 8)")
	if _ = flags.Parse(args); *id == "" || *pid <= 0 || flags.NArg() > 0 {
		return flag.ErrHelp
	}

	dir, tidy, err := workingIn(*workDir)
	if err != nil {
		return err
	}
	defer func() { failed = tidy(failed) }()
	options := relay.Options{
		Snapshot: *id,
		To:       *to,
		Proxy:    relay.Daemon(*proxy),
		PreDumps: *preDumps,
		Round: func(round relay.Round) {
			fmt.Printf("round %d: %d KiB in %.3f s\n", round.Number, round.Bytes>>10, round.Took.Seconds())
		},
	}
	if *handOver != "" {
		options.HandOver = func(ctx context.Context) error {
			shell := exec.CommandContext(ctx, "sh", "-c", *handOver)
			shell.Stdout, shell.Stderr = os.Stdout, os.Stderr
			return shell.Run()
		}
	}
	source, err := relay.NewSource(ctx, options)
	if err != nil {
		return err
	}
	defer source.Close()
	if err := source.Migrate(int32(*pid), dir); err != nil {
		return err
	}
	fmt.Printf("%s: process %d is at the cache and gone here\n", *id, *pid)
	return nil
}

func restore(ctx context.Context, args []string) (failed error) {
	flags := flag.NewFlagSet("restore", flag.ExitOnError)
	id := flags.String("id", "", "the snapshot's `id`")
	cache := flags.String("cache", string(relay.Cache), "the cache's control `socket`")
	workDir := flags.String("work-dir", "", "a `directory` for the log, kept (default: a temporary one, kept on failure)")
	if _ = flags.Parse(args); *id == "" || flags.NArg() > 0 {
		return flag.ErrHelp
	}

	path, tidy, err := workingIn(*workDir)
	if err != nil {
		return err
	}
	defer func() { failed = tidy(failed) }()
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	daemon := relay.Daemon(*cache)
	options := &rpc.CriuOpts{WorkDirFd: proto.Int32(int32(dir.Fd()))}
	if err := relay.Restore(ctx, daemon, *id, options, nil); err != nil {
		return err
	}
	fmt.Printf("%s: restored\n", *id)
	// It runs: that the cache keeps its images is no failure.
	if err := daemon.Drop(ctx, *id); err != nil {
		fmt.Fprintf(os.Stderr, "phaul-relay: %v\n", err)
	}
	return nil
}

// workingIn gives a directory to work in: the one named, or a temporary one. What is temporary is removed by tidy, unless
// there is an error to be looked into.
func workingIn(named string) (dir string, tidy func(error) error, err error) {
	if named != "" {
		return named, func(failed error) error { return failed }, os.MkdirAll(named, 0o700)
	}
	if dir, err = os.MkdirTemp("", "phaul-relay-"); err != nil {
		return "", nil, err
	}
	return dir, func(failed error) error {
		if failed != nil {
			return fmt.Errorf("%w\nCRIU's logs are in %s", failed, dir)
		}
		return os.RemoveAll(dir)
	}, nil
}
