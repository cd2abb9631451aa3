import asyncio

from sandbox_tools import Sessions


async def main() -> None:
    async with Sessions() as sessions:
        session = sessions.session("a-conversation")
        async with session.lease() as sandbox:  # the first turn makes a sandbox
            await sandbox.run_code("answer = 42; open('note.txt', 'w').write('kept')")
        await session.pause()  # memory and files are on disk now, and its RAM is free
        async with session.lease() as sandbox:  # the next turn wakes it
            print((await sandbox.run_code("f'{answer}, {open(\"note.txt\").read()}'")).text)
        await session.kill()


asyncio.run(main())
